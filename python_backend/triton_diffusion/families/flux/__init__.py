"""FLUX.1 (Black Forest Labs): pictures by flow matching, with CLIP and T5 and a 16-channel autoencoder."""

from triton_diffusion.families.flux.family import FAMILY

__all__ = ["FAMILY"]
