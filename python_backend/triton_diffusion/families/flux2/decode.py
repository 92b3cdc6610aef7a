"""FLUX.2 latents to pictures, as diffusers' Flux2Pipeline does it."""

from __future__ import annotations

import torch

from triton_diffusion.families.flux2.family import PATCH_SIZE, pixels_per_token
from triton_diffusion.families.flux2.latents import denormalized
from triton_diffusion.families.latents import unpack_latents
from triton_diffusion.families.pictures import to_uint8
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def decode(components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """Pictures uint8 (B, H, W, 3) of packed latents (B, S, C)."""
    vae = components["vae"]
    size = pixels_per_token(components.checkpoint)
    patches = denormalized(vae, latents.to(vae.device, vae.dtype))
    latents = unpack_latents(patches, request.height // size, request.width // size)
    return to_uint8(vae.decode(latents, return_dict=False)[0])


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Packed latents (num_outputs, S, C), zeros."""
    size = pixels_per_token(components.checkpoint)
    num_tokens = (request.height // size) * (request.width // size)
    channels = components["vae"].config.latent_channels * PATCH_SIZE**2
    return {"latents": torch.zeros(request.num_outputs, num_tokens, channels)}
