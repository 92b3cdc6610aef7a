"""FLUX.1 (Black Forest Labs): text to image by flow matching, CLIP and T5 as text encoders, a 16-channel autoencoder."""

from triton_diffusion.families.flux.family import FAMILY

__all__ = ["FAMILY"]
