"""GLM-Image denoising: noise, schedule and one forward pass, each as diffusers' GlmImagePipeline does it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

from triton_diffusion.families.base import Schedule
from triton_diffusion.families.glm_image.conditions import Conditions, conditions_of, picture_lengths
from triton_diffusion.families.glm_image.family import FAMILY, vae_scale
from triton_diffusion.families.latents import draw_noise
from triton_diffusion.families.schedules import new_noise_scheduler
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Whole timesteps, evenly from the first down, and their sigmas, shifted by the square root of the image tokens."""
    noise_scheduler = new_noise_scheduler(components)
    config, steps = noise_scheduler.config, request.num_inference_steps
    timesteps = np.linspace(config.num_train_timesteps, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    ratio = FAMILY.num_image_tokens(request, components.checkpoint) / config.get("base_image_seq_len", 256)
    mu = math.sqrt(ratio) * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)
    noise_scheduler.set_timesteps(
        steps, device=components.device, timesteps=timesteps, sigmas=timesteps / config.num_train_timesteps, mu=mu
    )
    return Schedule(noise_scheduler, noise_scheduler.timesteps)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise (num_outputs, C, h, w), drawn in the compute dtype; float32, as the pipeline's latents after a step."""
    scale = vae_scale(components.checkpoint)
    shape = (components["transformer"].config.in_channels, request.height // scale, request.width // scale)
    return draw_noise(shape, generators, components.dtype).float().to(components.device)


def shared_inputs(
    components: Components, request: GenerationRequest, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The size of the picture target_size (1, 2), which the transformer is told."""
    size = [[request.height, request.width]]
    return {"target_size": torch.tensor(size, device=components.device, dtype=components.dtype)}


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, 1, D) of no quoted words, prior_token_ids (1, S) and prior_token_drop (1, 1)."""
    num_tokens = FAMILY.num_image_tokens(request, components.checkpoint)
    return {
        "prompt_embeds": torch.zeros(1, 1, components["transformer"].config.text_embed_dim),
        "prior_token_ids": torch.zeros(1, num_tokens, dtype=torch.long),
        "prior_token_drop": torch.zeros(1, 1, dtype=torch.bool),
    }


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, C, h, w), float32, at latents (B, C, h, w), row i at timesteps[i].

    Only conditional predictions see condition pictures, so those have a forward pass of their own.
    """
    transformer = components["transformer"]
    conditions = conditions_of(transformer, conditioning)
    if conditions is None:
        return _forward(transformer, latents, timesteps, conditioning, shared, None)
    predictions = torch.empty_like(latents, dtype=torch.float32)
    for rows, caches in ((conditions.conditional, conditions), (conditions.unconditional, None)):
        if rows:
            own = {name: tensor[rows] for name, tensor in conditioning.items()}
            predictions[rows] = _forward(transformer, latents[rows], timesteps[rows], own, shared, caches)
    return predictions


def _forward(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
    conditions: Conditions | None,
) -> torch.Tensor:
    embeds, prior = conditioning["prompt_embeds"], conditioning["prior_token_ids"]
    size = shared["target_size"].expand(len(latents), -1)
    cache: GlmImageKVCache | None = None if conditions is None else conditions.cache
    prediction: torch.Tensor = transformer(
        hidden_states=latents.to(embeds.dtype),
        encoder_hidden_states=embeds,
        prior_token_id=prior,
        prior_token_drop=conditioning["prior_token_drop"].expand_as(prior),
        # Timesteps of the transformer count from 0.
        timestep=timesteps - 1,
        target_size=size,
        crop_coords=torch.zeros_like(size),
        attention_mask=conditioning.get("prompt_embeds_mask"),
        attention_kwargs=picture_lengths([] if conditions is None else conditions.lengths, latents.device),
        kv_caches=cache,
        return_dict=False,
    )[0]
    return prediction.float()
