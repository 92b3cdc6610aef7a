"""HunyuanVideo latents to videos, as diffusers' HunyuanVideo pipelines do it."""

from __future__ import annotations

import torch

from triton_diffusion.families.hunyuan_video.family import FRAMES_LEFT_OUT, image_condition, latent_size
from triton_diffusion.families.pictures import to_uint8
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def decode(components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """Videos uint8 (B, F, H, W, 3) of latents (B, C, f, h, w).

    The autoencoder decodes long videos in overlapping parts of 16 frames, whether or not it tiles the pictures. Where
    the picture is further channels, the first frames are left out, but for a preview, which has no others.
    """
    vae = components["vae"]
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    video: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    if image_condition(components.checkpoint) == "latent_concat" and latents.shape[2] > 1:
        video = video[:, :, FRAMES_LEFT_OUT:]
    return to_uint8(video)


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Latents (num_outputs, C, f, h, w), zeros."""
    channels = components["vae"].config.latent_channels
    return {"latents": torch.zeros(request.num_outputs, channels, *latent_size(components.checkpoint, request))}
