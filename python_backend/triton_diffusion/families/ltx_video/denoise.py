"""LTX-Video denoising: noise, schedule and one forward pass, as diffusers' LTXPipeline does it.

Where a picture is given, as LTXImageToVideoPipeline does it: the latents of the first frame are clean from the start,
their tokens are at timestep 0, and nothing moves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import Schedule
from triton_diffusion.families.latents import draw_noise, sample_moments
from triton_diffusion.families.ltx_video.family import FRAME_RATE, compression, latent_size
from triton_diffusion.families.schedules import flow_match_schedule
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Sigmas shifted for the number of tokens.

    Raises:
        InvalidRequestError: one step is to be both where the schedule starts and where it ends.
    """
    terminal = components["scheduler"].config.get("shift_terminal")
    if terminal and request.num_inference_steps == 1:
        raise InvalidRequestError(
            f"num_inference_steps=1 must be at least 2 for this checkpoint, whose last step is at sigma {terminal}"
        )
    frames, height, width = latent_size(components.checkpoint, request)
    return flow_match_schedule(components, request, frames * height * width)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise (num_outputs, C, F, H, W) in float32, behind the first frame where that is given.

    The pipelines pack latents to a sequence of tokens before the first step; here `predict` does it.
    """
    shape = (components["transformer"].config.in_channels, *latent_size(components.checkpoint, request))
    if "initial_moments" not in inputs:
        return draw_noise(shape, generators, torch.float32).to(components.device)
    first = sample_moments(inputs["initial_moments"].cpu(), generators).float()
    mean, std = (inputs[name].cpu().float()[:, :, None, None, None] for name in ("initial_mean", "initial_std"))
    latents = draw_noise(shape, generators, torch.float32)
    latents[:, :, :1] = (first - mean) / std
    return latents.to(components.device)


def shared_inputs(
    components: Components, request: GenerationRequest, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """video_coords (1, 3, S), float32: where every token is, in seconds and pixels."""
    size = latent_size(components.checkpoint, request)
    temporal, spatial = compression(components.checkpoint)
    steps = (temporal / (request.fps or FRAME_RATE), spatial, spatial)
    axes = [torch.arange(count, dtype=torch.float32) * step for count, step in zip(size, steps, strict=True)]
    coords = torch.stack(torch.meshgrid(axes, indexing="ij")).flatten(1)[None]
    return {"video_coords": coords.to(components.device)}


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, L, D), zeros, and prompt_attention_mask (1, L), all True."""
    length = request.max_sequence_length
    return {
        "prompt_embeds": torch.zeros(1, length, components["transformer"].config.caption_channels),
        "prompt_attention_mask": torch.ones(1, length, dtype=torch.bool),
    }


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, C, F, H, W), float32, at latents (B, C, F, H, W), row i at timesteps[i]."""
    given = conditioning.get("given_tokens")
    tokens: torch.Tensor = components["transformer"](
        hidden_states=latents.flatten(2).transpose(1, 2).to(components.dtype),
        timestep=timesteps if given is None else timesteps[:, None] * ~given,
        encoder_hidden_states=conditioning["prompt_embeds"],
        encoder_attention_mask=conditioning["prompt_attention_mask"],
        video_coords=shared["video_coords"],
        return_dict=False,
    )[0].float()
    if given is not None:
        tokens = tokens.masked_fill(given[..., None], 0)
    return tokens.transpose(1, 2).reshape(latents.shape)
