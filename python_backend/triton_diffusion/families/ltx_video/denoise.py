"""LTX-Video denoising: noise, schedule and one forward pass, as diffusers' LTXPipeline does it.

Where a picture is given, as LTXImageToVideoPipeline does it: the latents of the first frame are clean from the start,
their tokens are at timestep 0, and nothing moves them. As LTXConditionPipeline does it for its checkpoints: a schedule
of its own, and a little noise on the frame that is given, new in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import Schedule
from triton_diffusion.families.latents import draw_noise, sample_moments
from triton_diffusion.families.ltx_video.family import FRAME_RATE, compression, latent_size, takes_conditions
from triton_diffusion.families.ltx_video.first_frame import FlowMatchEulerFirstFrameScheduler
from triton_diffusion.families.schedules import flow_match_schedule, new_noise_scheduler, start_schedule
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# Noise levels of LTXConditionPipeline are from 0 to 1, timesteps from 0 to 1000.
TIMESTEP_SCALE = 1000


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Sigmas shifted for the number of tokens, or those that LTXConditionPipeline makes for every size.

    Raises:
        InvalidRequestError: one step is to be both where the schedule starts and where it ends.
    """
    if takes_conditions(components.checkpoint):
        return _linear_quadratic_schedule(components, request)
    terminal = components["scheduler"].config.get("shift_terminal")
    if terminal and request.num_inference_steps == 1:
        raise InvalidRequestError(
            f"num_inference_steps=1 must be at least 2 for this checkpoint, whose last step is at sigma {terminal}"
        )
    frames, height, width = latent_size(components.checkpoint, request)
    return flow_match_schedule(components, request, frames * height * width)


def _linear_quadratic_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Half of the steps are short, and all at high noise (LTX-Video's rf.py)."""
    timesteps = linear_quadratic_schedule(request.num_inference_steps).numpy() * TIMESTEP_SCALE
    noise_scheduler = (
        FlowMatchEulerFirstFrameScheduler.from_config(components["scheduler"].config)
        if request.num_images
        else new_noise_scheduler(components)
    )
    # The pipeline gives timesteps alone, of which the noise scheduler makes these sigmas, with a warning.
    noise_scheduler.set_timesteps(sigmas=timesteps / TIMESTEP_SCALE, timesteps=timesteps, device=components.device)
    return start_schedule(noise_scheduler, request)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise (num_outputs, C, F, H, W) in float32, behind the first frame where that is given.

    The pipelines pack latents to a sequence of tokens before the first step; here `predict` does it.
    Every output samples the picture for itself; LTXConditionPipeline has the sample of the first output for all.
    """
    shape = (components["transformer"].config.in_channels, *latent_size(components.checkpoint, request))
    if "initial_moments" not in inputs:
        return draw_noise(shape, generators, torch.float32).to(components.device)
    moments = inputs["initial_moments"].cpu()
    if takes_conditions(components.checkpoint):
        latents = draw_noise(shape, generators, torch.float32)
        first = sample_moments(moments, generators).float()
    else:
        first = sample_moments(moments, generators).float()
        latents = draw_noise(shape, generators, torch.float32)
    mean, std = (inputs[name].cpu().float()[:, :, None, None, None] for name in ("initial_mean", "initial_std"))
    latents[:, :, :1] = (first - mean) / std
    return latents.to(components.device)


def shared_inputs(
    components: Components, request: GenerationRequest, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """video_coords (1, 3, S), float32: where every token is, in seconds and pixels."""
    size = latent_size(components.checkpoint, request)
    temporal, spatial = compression(components.checkpoint)
    frame_rate = request.fps or FRAME_RATE
    steps = (temporal / frame_rate, spatial, spatial)
    axes = [torch.arange(count, dtype=torch.float32) * step for count, step in zip(size, steps, strict=True)]
    if takes_conditions(components.checkpoint):
        # The first latent frame is one frame, and the others have the time of the first of theirs.
        axes[0] = (torch.arange(size[0]) * temporal + 1 - temporal).clamp(min=0).float() * (1.0 / frame_rate)
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
