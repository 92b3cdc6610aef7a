"""GLM-Image (Zhipu AI): an autoregressive prior draws up the picture in tokens, a diffusion transformer fills it in."""

from triton_diffusion.families.glm_image.family import FAMILY

__all__ = ["FAMILY"]
