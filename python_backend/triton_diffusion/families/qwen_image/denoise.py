"""Qwen-Image denoising: noise, schedule and one forward pass, each as diffusers' QwenImage pipelines do it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import Schedule
from triton_diffusion.families.latents import PATCH_SIZE, draw_noise, pack_latents
from triton_diffusion.families.qwen_image.family import PICTURE_AREA, compression, pixels_per_token
from triton_diffusion.families.schedules import flow_match_schedule
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# The transformer multiplies its timestep argument by this; noise schedulers count timesteps from 0 to 1000.
TIMESTEP_SCALE = 1000
_PICTURES = "image_latents_"


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Sigmas shifted for the length of the sequence that becomes the picture; those that are edited do not count.

    Raises:
        InvalidRequestError: one step, in a schedule that is stretched to end at a given sigma.
    """
    terminal = components["scheduler"].config.get("shift_terminal")
    if terminal and request.num_inference_steps == 1:
        # Where it starts, at 1, it cannot end too: diffusers divides 0 by 0.
        raise InvalidRequestError(
            f"num_inference_steps=1 cannot start at noise level 1 and end at {terminal}, as the schedule of this "
            "checkpoint does; use 2 or more"
        )
    height, width = _token_grid(components, request)
    return flow_match_schedule(components, request, height * width)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise (num_outputs, S, C) in the compute dtype."""
    height, width = (PATCH_SIZE * size for size in _token_grid(components, request))
    noise = draw_noise((_latent_channels(components), height, width), generators, components.dtype)
    return pack_latents(noise).to(components.device)


def shared_inputs(
    components: Components, request: GenerationRequest, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """img_shapes (1 + pictures, 3), on the CPU: frames, rows and columns of tokens of the result and each picture."""
    grids = [_token_grid(components, request)]
    for name in _picture_names(inputs):
        height, width = inputs[name].shape[2:]
        grids.append((height // PATCH_SIZE, width // PATCH_SIZE))
    return {"img_shapes": torch.tensor([(1, *grid) for grid in grids])}


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, L, D) and the latents (1, C, h, w) of as many square pictures as the request has, zeros."""
    side = math.isqrt(PICTURE_AREA) // compression(components.checkpoint)
    width = components["transformer"].config.joint_attention_dim
    pictures = (torch.zeros(1, _latent_channels(components), side, side) for _ in range(request.num_images))
    return {
        "prompt_embeds": torch.zeros(1, request.max_sequence_length, width),
        **{f"{_PICTURES}{index}": picture for index, picture in enumerate(pictures)},
    }


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, S, C) at latents (B, S, C), row i at timesteps[i]; pictures to edit stand behind the latents."""
    batch, length, _ = latents.shape
    pictures = [pack_latents(conditioning[name]) for name in _picture_names(conditioning)]
    shapes = [(frames, height, width) for frames, height, width in shared["img_shapes"].tolist()]
    prediction: torch.Tensor = components["transformer"](
        hidden_states=torch.cat([latents, *pictures], dim=1),
        timestep=timesteps.to(latents.dtype) / TIMESTEP_SCALE,
        encoder_hidden_states=conditioning["prompt_embeds"],
        encoder_hidden_states_mask=conditioning.get("prompt_embeds_mask"),
        img_shapes=[shapes] * batch,
        return_dict=False,
    )[0]
    return prediction[:, :length]


def _picture_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted(name for name in tensors if name.startswith(_PICTURES))


def _latent_channels(components: Components) -> int:
    channels: int = components["transformer"].config.in_channels // PATCH_SIZE**2
    return channels


def _token_grid(components: Components, request: GenerationRequest) -> tuple[int, int]:
    size = pixels_per_token(components.checkpoint)
    return request.height // size, request.width // size
