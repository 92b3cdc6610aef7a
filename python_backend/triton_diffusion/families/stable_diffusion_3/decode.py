"""Stable Diffusion 3 latents to pictures, as diffusers' StableDiffusion3Pipeline does it."""

from __future__ import annotations

import torch

from triton_diffusion.families.pictures import to_uint8
from triton_diffusion.families.stable_diffusion_3.family import pixels_per_latent
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def decode(components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """Pictures uint8 (B, H, W, 3) of latents (B, C, H/8, W/8)."""
    vae = components["vae"]
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return to_uint8(vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0])


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Latents (num_outputs, C, H/8, W/8), zeros."""
    size = pixels_per_latent(components.checkpoint)
    channels = components["vae"].config.latent_channels
    return {"latents": torch.zeros(request.num_outputs, channels, request.height // size, request.width // size)}
