"""HunyuanVideo denoising: noise, schedule and one forward pass, each as diffusers' HunyuanVideoPipeline does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from triton_diffusion.families.base import Schedule
from triton_diffusion.families.hunyuan_video.family import latent_size
from triton_diffusion.families.latents import draw_noise
from triton_diffusion.families.schedules import new_noise_scheduler, start_schedule
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# The transformer was trained with the embedded guidance scale on the scale of the timesteps.
GUIDANCE_FACTOR = 1000.0


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Sigmas from 1 down to 1 / steps, with a shift that is the same for all sizes."""
    noise_scheduler = new_noise_scheduler(components, request.flow_shift)
    sigmas = np.linspace(1.0, 0.0, request.num_inference_steps + 1)[:-1]
    noise_scheduler.set_timesteps(sigmas=sigmas, device=components.device)
    return start_schedule(noise_scheduler, request)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise (num_outputs, C, F, H, W) in float32, which the first step makes the compute dtype of."""
    channels = components["transformer"].config.in_channels
    size = latent_size(components.checkpoint, request)
    return draw_noise((channels, *size), generators, torch.float32).to(components.device)


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, L, D), pooled_prompt_embeds (1, P), both zeros, and prompt_attention_mask (1, L), all True.

    A mask that hides all would make the mean over the prompt a division by zero.
    """
    config, length = components["transformer"].config, request.max_sequence_length
    return {
        "prompt_embeds": torch.zeros(1, length, config.text_embed_dim),
        "pooled_prompt_embeds": torch.zeros(1, config.pooled_projection_dim),
        "prompt_attention_mask": torch.ones(1, length, dtype=torch.bool),
    }


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, C, F, H, W) at latents (B, C, F, H, W), row i at timesteps[i]."""
    transformer, dtype = components["transformer"], components.dtype
    prediction: torch.Tensor = transformer(
        hidden_states=latents.to(dtype),
        # Both are rounded to the compute dtype, as in the pipeline.
        timestep=timesteps.to(dtype),
        guidance=conditioning["embedded_guidance_scale"].to(dtype) * GUIDANCE_FACTOR,
        encoder_hidden_states=conditioning["prompt_embeds"],
        encoder_attention_mask=conditioning["prompt_attention_mask"],
        pooled_projections=conditioning["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return prediction
