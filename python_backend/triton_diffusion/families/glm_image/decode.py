"""GLM-Image latents to pictures, as diffusers' GlmImagePipeline does it."""

from __future__ import annotations

import torch

from triton_diffusion.families.glm_image.family import vae_scale
from triton_diffusion.families.pictures import to_uint8
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def decode(components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """Pictures uint8 (B, H, W, 3) of latents (B, C, h, w), normalised by channel."""
    vae = components["vae"]
    latents = latents.to(vae.device, vae.dtype)
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return to_uint8(vae.decode(latents * std + mean, return_dict=False)[0])


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Latents (num_outputs, C, h, w), zeros."""
    scale = vae_scale(components.checkpoint)
    channels = components["vae"].config.latent_channels
    return {"latents": torch.zeros(request.num_outputs, channels, request.height // scale, request.width // scale)}
