"""Stable Diffusion 3 denoising: noise, schedule and one forward pass, as diffusers' pipelines do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import Schedule
from triton_diffusion.families.latents import draw_noise, noised_picture
from triton_diffusion.families.schedules import new_noise_scheduler, resolution_shift, start_schedule
from triton_diffusion.families.stable_diffusion_3.family import FAMILY, largest_side, pixels_per_latent
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """The noise scheduler's own sigmas, shifted by a fixed factor or for the number of image tokens."""
    noise_scheduler = new_noise_scheduler(components, request.flow_shift)
    mu = None
    if noise_scheduler.config.get("use_dynamic_shifting"):
        mu = resolution_shift(noise_scheduler.config, FAMILY.num_image_tokens(request, components.checkpoint))
    noise_scheduler.set_timesteps(request.num_inference_steps, device=components.device, mu=mu)
    return start_schedule(noise_scheduler, request)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise, or a noised picture, (num_outputs, C, H/8, W/8) in the compute dtype.

    Raises:
        InvalidRequestError: the picture has more positions along a side than the transformer has learnt.
    """
    checkpoint = components.checkpoint
    if max(request.height, request.width) > (highest := largest_side(checkpoint)):
        raise InvalidRequestError(
            f"height={request.height} x width={request.width} must be at most {highest} a side for this model; "
            "ask for a smaller picture"
        )
    if "initial_moments" in inputs:
        scaling, shift = (checkpoint.setting("vae", f"{name}_factor") for name in ("scaling", "shift"))
        moments = inputs["initial_moments"].cpu()
        return noised_picture(moments, schedule, generators, scaling, shift).to(components.device, components.dtype)
    size = pixels_per_latent(checkpoint)
    shape = (components["transformer"].config.in_channels, request.height // size, request.width // size)
    return draw_noise(shape, generators, components.dtype).to(components.device)


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, C + L, D) and pooled_prompt_embeds (1, P), zeros."""
    config = components["transformer"].config
    length = FAMILY.num_text_tokens(request, components.checkpoint)
    return {
        "prompt_embeds": torch.zeros(1, length, config.joint_attention_dim),
        "pooled_prompt_embeds": torch.zeros(1, config.pooled_projection_dim),
    }


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, C, H/8, W/8) at latents of that shape, row i at timesteps[i]."""
    prediction: torch.Tensor = components["transformer"](
        hidden_states=latents,
        timestep=timesteps,
        encoder_hidden_states=conditioning["prompt_embeds"],
        pooled_projections=conditioning["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return prediction
