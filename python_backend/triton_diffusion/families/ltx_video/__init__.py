"""LTX-Video (Lightricks): text or a picture to video by flow matching, with T5 and an autoencoder of large patches."""

from triton_diffusion.families.ltx_video.family import FAMILY

__all__ = ["FAMILY"]
