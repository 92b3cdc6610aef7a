"""HunyuanVideo (Tencent): text to video by flow matching, with LLaMA and CLIP and a causal 3-D autoencoder."""

from triton_diffusion.families.hunyuan_video.family import FAMILY

__all__ = ["FAMILY"]
