"""Stable Diffusion 1 and 2 (CompVis, Runway, Stability AI): text to image by a UNet over latents, with one CLIP."""

from triton_diffusion.families.stable_diffusion.family import FAMILY

__all__ = ["FAMILY"]
