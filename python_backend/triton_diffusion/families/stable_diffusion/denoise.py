"""Stable Diffusion's denoising: noise, schedule and one forward pass, as diffusers' StableDiffusionPipeline does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from triton_diffusion.families.base import Schedule
from triton_diffusion.families.latents import draw_noise, noised_picture
from triton_diffusion.families.schedules import new_noise_scheduler, start_schedule
from triton_diffusion.families.stable_diffusion.family import pixels_per_latent
from triton_diffusion.families.stable_diffusion.scaling import scaling_and_shift
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# Settings that old checkpoints have wrong, or not at all: StableDiffusionPipeline corrects them when it is made.
_CORRECTED = {"steps_offset": 1, "clip_sample": False}


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """The noise scheduler's own timesteps."""
    noise_scheduler = new_noise_scheduler(components)
    known = {name: value for name, value in _CORRECTED.items() if name in noise_scheduler.config}
    noise_scheduler.register_to_config(**known)
    noise_scheduler.set_timesteps(request.num_inference_steps, device=components.device)
    return start_schedule(noise_scheduler, request)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise, or a noised picture, (num_outputs, C, H/8, W/8) in the compute dtype."""
    checkpoint, dtype = components.checkpoint, components.dtype
    if "initial_moments" in inputs:
        scaling, shift = scaling_and_shift(checkpoint.config("vae"))
        latents = noised_picture(inputs["initial_moments"].cpu(), schedule, generators, scaling, shift, dtype)
    else:
        size = pixels_per_latent(checkpoint)
        shape = (components["unet"].config.in_channels, request.height // size, request.width // size)
        # Some noise schedulers count noise in units of the clean latents: theirs starts at a sigma far above 1.
        latents = draw_noise(shape, generators, dtype) * schedule.noise_scheduler.init_noise_sigma
    return latents.to(components.device, dtype)


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, L, D), zeros."""
    width = components["unet"].config.cross_attention_dim
    return {"prompt_embeds": torch.zeros(1, request.max_sequence_length, width)}


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Noise, v or the clean latents, whichever the UNet was trained for: (B, C, H/8, W/8), row i at timesteps[i]."""
    prediction: torch.Tensor = components["unet"](
        latents, timesteps, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False
    )[0]
    return prediction
