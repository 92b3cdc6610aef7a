"""Stable Diffusion XL's latents to pictures, as diffusers' StableDiffusionXLPipeline does it, without a watermark."""

from __future__ import annotations

import torch

from triton_diffusion.families.stable_diffusion import decode as stable_diffusion
from triton_diffusion.families.stable_diffusion.decode import example_inputs
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

__all__ = ["decode", "example_inputs"]


def decode(components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """Pictures uint8 (B, H, W, 3) of latents (B, C, H/8, W/8); in float32 where float16 would overflow."""
    vae = components["vae"]
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        vae.to(torch.float32)
    return stable_diffusion.decode(components, latents, request)
