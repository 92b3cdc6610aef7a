"""Stable Diffusion XL's denoising, as diffusers' StableDiffusionXLPipeline does it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from triton_diffusion.families.base import Schedule
from triton_diffusion.families.schedules import new_noise_scheduler, start_schedule
from triton_diffusion.families.stable_diffusion.denoise import prepare_latents
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

__all__ = ["example_inputs", "predict", "prepare_latents", "prepare_schedule", "shared_inputs"]

NUM_TIME_IDS = 6


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """The noise scheduler's own timesteps."""
    noise_scheduler = new_noise_scheduler(components)
    noise_scheduler.set_timesteps(request.num_inference_steps, device=components.device)
    return start_schedule(noise_scheduler, request)


def shared_inputs(
    components: Components, request: GenerationRequest, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """time_ids (1, 6): size before cropping, corner of the crop, size; as of a picture that was not cropped."""
    size = (request.height, request.width)
    time_ids = torch.tensor([(*size, 0, 0, *size)], dtype=components.dtype)
    return {"time_ids": time_ids.to(components.device)}


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, L, D) and pooled_prompt_embeds (1, P), zeros."""
    config = components["unet"].config
    pooled_width = config.projection_class_embeddings_input_dim - NUM_TIME_IDS * config.addition_time_embed_dim
    return {
        "prompt_embeds": torch.zeros(1, request.max_sequence_length, config.cross_attention_dim),
        "pooled_prompt_embeds": torch.zeros(1, pooled_width),
    }


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Noise, v or the clean latents, whichever the UNet was trained for: (B, C, H/8, W/8), row i at timesteps[i]."""
    prediction: torch.Tensor = components["unet"](
        latents,
        timesteps,
        encoder_hidden_states=conditioning["prompt_embeds"],
        added_cond_kwargs={
            "text_embeds": conditioning["pooled_prompt_embeds"],
            "time_ids": shared["time_ids"].expand(len(latents), -1),
        },
        return_dict=False,
    )[0]
    return prediction
