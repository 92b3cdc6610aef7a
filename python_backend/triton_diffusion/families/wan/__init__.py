"""Wan 2.1 and 2.2 (Alibaba): text and pictures to video by flow matching, with UMT5 and a causal 3-D autoencoder."""

from triton_diffusion.families.wan.family import FAMILY

__all__ = ["FAMILY"]
