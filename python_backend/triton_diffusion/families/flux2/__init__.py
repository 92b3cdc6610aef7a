"""FLUX.2 (Black Forest Labs): pictures by flow matching, from a prompt and from pictures that stand beside it."""

from triton_diffusion.families.flux2.family import FAMILY

__all__ = ["FAMILY"]
