"""LTX-Video latents to videos, as diffusers' LTX pipelines do it."""

from __future__ import annotations

import torch

from triton_diffusion.families.ltx_video.family import latent_size
from triton_diffusion.families.pictures import to_uint8
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def decode(components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """Videos uint8 (B, F, H, W, 3) of latents (B, C, f, h, w).

    Decoders that take a timestep get 0, and so latents without noise: the defaults of the pipeline (decode_timestep,
    decode_noise_scale). Some (0.9.1) add noise inside, which the pipeline draws from torch's global generator; from a
    fixed seed, it is the same for a video alone and in a batch.
    """
    vae = components["vae"]
    mean, std = (
        tensor.to(vae.device, torch.float32)[:, None, None, None] for tensor in (vae.latents_mean, vae.latents_std)
    )
    scaled = (latents.to(vae.device).float() * std / vae.config.scaling_factor + mean).to(vae.dtype)
    timestep = scaled.new_zeros(len(scaled)) if vae.config.timestep_conditioning else None
    with torch.random.fork_rng(devices=[vae.device] if vae.device.type == "cuda" else []):
        torch.manual_seed(0)
        return to_uint8(vae.decode(scaled, timestep, return_dict=False)[0])


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Latents (num_outputs, C, f, h, w), zeros."""
    channels = components["vae"].config.latent_channels
    return {"latents": torch.zeros(request.num_outputs, channels, *latent_size(components.checkpoint, request))}
