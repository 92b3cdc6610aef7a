"""Z-Image (Alibaba Tongyi): text to image by flow matching, with Qwen3, and text and image in one sequence."""

from triton_diffusion.families.z_image.family import FAMILY

__all__ = ["FAMILY"]
