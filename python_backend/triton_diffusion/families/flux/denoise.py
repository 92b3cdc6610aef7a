"""FLUX denoising: noise, schedule and one forward pass, each as diffusers' FluxPipeline does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from triton_diffusion.families.flux.family import PATCH_SIZE, pixels_per_token
from triton_diffusion.families.flux.packing import pack_latents
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# The transformer multiplies its timestep argument by this; noise schedulers count timesteps from 0 to 1000.
TIMESTEP_SCALE = 1000


def prepare_schedule(components: Components, request: GenerationRequest) -> Any:
    """A diffusers scheduler at its first step, its sigmas shifted for the length of the image sequence."""
    config = components["scheduler"].config
    noise_scheduler = type(components["scheduler"]).from_config(config)
    steps = request.num_inference_steps
    height, width = _token_grid(components, request)
    mu = _resolution_shift(config, height * width)
    sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    noise_scheduler.set_timesteps(steps, device=components.device, sigmas=sigmas, mu=mu)
    noise_scheduler.set_begin_index(0)
    return noise_scheduler


def prepare_latents(components: Components, request: GenerationRequest) -> torch.Tensor:
    """Noise (num_outputs, S, C) in the compute dtype.

    It is drawn on the CPU by one generator a row: the same on every device and rank, and the same as FluxPipeline's
    with `generator=[torch.Generator().manual_seed(seed), ...]`.
    """
    channels = components["transformer"].config.in_channels // PATCH_SIZE**2
    height, width = (PATCH_SIZE * size for size in _token_grid(components, request))
    rows = [
        torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=components.dtype)
        for seed in request.output_seeds
    ]
    return pack_latents(torch.cat(rows)).to(components.device)


def shared_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Position ids of the image tokens (S, 3) and text tokens (L, 3): equal for all rows of a batch_key."""
    height, width = _token_grid(components, request)
    img_ids = torch.zeros(height, width, 3)
    img_ids[..., 1] = torch.arange(height)[:, None]
    img_ids[..., 2] = torch.arange(width)[None, :]
    txt_ids = torch.zeros(request.max_sequence_length, 3)
    ids = {"img_ids": img_ids.reshape(-1, 3), "txt_ids": txt_ids}
    return {name: tensor.to(components.device, components.dtype) for name, tensor in ids.items()}


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, L, D) and pooled_prompt_embeds (1, P), zeros."""
    config = components["transformer"].config
    return {
        "prompt_embeds": torch.zeros(1, request.max_sequence_length, config.joint_attention_dim),
        "pooled_prompt_embeds": torch.zeros(1, config.pooled_projection_dim),
    }


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, S, C) at latents (B, S, C), row i at timesteps[i]."""
    transformer = components["transformer"]
    prediction: torch.Tensor = transformer(
        hidden_states=latents,
        timestep=timesteps.to(latents.dtype) / TIMESTEP_SCALE,
        guidance=conditioning["embedded_guidance_scale"] if transformer.config.guidance_embeds else None,
        pooled_projections=conditioning["pooled_prompt_embeds"],
        encoder_hidden_states=conditioning["prompt_embeds"],
        txt_ids=shared["txt_ids"],
        img_ids=shared["img_ids"],
        return_dict=False,
    )[0]
    return prediction


def _token_grid(components: Components, request: GenerationRequest) -> tuple[int, int]:
    size = pixels_per_token(components.checkpoint)
    return request.height // size, request.width // size


def _resolution_shift(config: Mapping[str, Any], image_seq_len: int) -> float:
    """mu, linear in the number of image tokens: large pictures stay longer at high noise (calculate_shift)."""
    base_len, max_len = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_len - base_len)
    mu: float = base_shift + slope * (image_seq_len - base_len)
    return mu
