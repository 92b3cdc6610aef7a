"""HunyuanVideo (Tencent): text and pictures to video by flow matching, with LLaMA, CLIP and a causal autoencoder."""

from triton_diffusion.families.hunyuan_video.family import FAMILY

__all__ = ["FAMILY"]
