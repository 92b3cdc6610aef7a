"""Wan latents to videos, as diffusers' WanPipeline does it."""

from __future__ import annotations

from typing import Any

import torch

from triton_diffusion.families.pictures import to_uint8
from triton_diffusion.families.wan.family import latent_size
from triton_diffusion.families.wan.normalization import denormalize
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# Frames that are in float32 at once, of a video that is otherwise in the compute dtype or uint8.
_FRAMES_AT_ONCE = 8


def decode(components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """Videos uint8 (B, F, H, W, 3) of latents (B, C, f, h, w).

    One video at a time: the autoencoder keeps the features of the frames before for every convolution.
    """
    return torch.cat([_decode_one(components["vae"], video) for video in latents.split(1)])


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Latents (num_outputs, C, f, h, w), zeros."""
    size = latent_size(request, components.checkpoint)
    return {"latents": torch.zeros(request.num_outputs, components["vae"].config.z_dim, *size)}


def _decode_one(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    latents = denormalize(vae, latents.to(vae.device, vae.dtype))
    video: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return torch.cat([to_uint8(frames) for frames in video.split(_FRAMES_AT_ONCE, dim=2)], dim=1)
