"""Stable Diffusion XL (Stability AI): as Stable Diffusion, with two CLIPs and a UNet that is told the size."""

from triton_diffusion.families.stable_diffusion_xl.family import FAMILY

__all__ = ["FAMILY"]
