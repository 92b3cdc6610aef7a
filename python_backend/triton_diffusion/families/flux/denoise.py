"""FLUX denoising: noise, schedule and one forward pass, each as diffusers' pipelines do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from triton_diffusion.families.base import Schedule
from triton_diffusion.families.flux.family import pixels_per_token
from triton_diffusion.families.latents import PATCH_SIZE, draw_noise, noised_picture, pack_latents
from triton_diffusion.families.schedules import flow_match_schedule
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# The transformer multiplies its timestep argument by this; noise schedulers count timesteps from 0 to 1000.
TIMESTEP_SCALE = 1000


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Sigmas shifted for the length of the image sequence."""
    height, width = _token_grid(components, request)
    return flow_match_schedule(components, request, height * width)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise, or a noised picture, (num_outputs, S, C) in the compute dtype."""
    if "initial_moments" in inputs:
        scaling, shift = (components.checkpoint.setting("vae", f"{name}_factor") for name in ("scaling", "shift"))
        latents = noised_picture(inputs["initial_moments"].cpu(), schedule, generators, scaling, shift)
    else:
        channels = components["transformer"].config.in_channels // PATCH_SIZE**2
        height, width = (PATCH_SIZE * size for size in _token_grid(components, request))
        latents = draw_noise((channels, height, width), generators, components.dtype)
    return pack_latents(latents).to(components.device, components.dtype)


def shared_inputs(
    components: Components, request: GenerationRequest, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Position ids of the image tokens (S, 3), or of those of both pictures, and of the text tokens (L, 3)."""
    grids = [_token_grid(components, request)]
    if (beside := inputs.get("image_latents")) is not None:
        grids.append((beside.shape[2] // PATCH_SIZE, beside.shape[3] // PATCH_SIZE))
    img_ids = torch.cat([_position_ids(picture, *grid) for picture, grid in enumerate(grids)])
    ids = {"img_ids": img_ids, "txt_ids": torch.zeros(request.max_sequence_length, 3)}
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
    num_tokens = latents.shape[1]
    # Kept as they are, so that rows whose pictures differ in shape, but not in the number of tokens, share no batch.
    if (beside := conditioning.get("image_latents")) is not None:
        latents = torch.cat([latents, pack_latents(beside)], dim=1)
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
    return prediction[:, :num_tokens]


def _token_grid(components: Components, request: GenerationRequest) -> tuple[int, int]:
    size = pixels_per_token(components.checkpoint)
    return request.height // size, request.width // size


def _position_ids(picture: int, height: int, width: int) -> torch.Tensor:
    """(height * width, 3): the number of the picture, row and column of each token."""
    ids = torch.full((height, width, 3), float(picture))
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.reshape(-1, 3)
