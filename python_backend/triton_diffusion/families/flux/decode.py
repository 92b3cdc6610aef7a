"""FLUX latents to pictures, as diffusers' FluxPipeline does it."""

from __future__ import annotations

import torch

from triton_diffusion.families.flux.family import pixels_per_token
from triton_diffusion.families.latents import PATCH_SIZE, unpack_latents
from triton_diffusion.families.pictures import to_uint8
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def decode(components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """Pictures uint8 (B, H, W, 3) of packed latents (B, S, C)."""
    vae = components["vae"]
    size = pixels_per_token(components.checkpoint)
    latents = unpack_latents(latents, request.height // size, request.width // size)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return to_uint8(vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0])


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Packed latents (num_outputs, S, C), zeros."""
    size = pixels_per_token(components.checkpoint)
    num_tokens = (request.height // size) * (request.width // size)
    channels = components["vae"].config.latent_channels * PATCH_SIZE**2
    return {"latents": torch.zeros(request.num_outputs, num_tokens, channels)}
