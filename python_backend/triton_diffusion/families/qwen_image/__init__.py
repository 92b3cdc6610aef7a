"""Qwen-Image: text to image and editing by flow matching, with Qwen2.5-VL as the encoder of prompts and pictures."""

from triton_diffusion.families.qwen_image.family import FAMILY

__all__ = ["FAMILY"]
