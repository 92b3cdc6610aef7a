"""Wan denoising: noise, schedule and one forward pass, each as diffusers' WanPipeline does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from triton_diffusion.families.base import Schedule
from triton_diffusion.families.latents import draw_noise
from triton_diffusion.families.schedules import new_noise_scheduler, start_schedule
from triton_diffusion.families.wan.family import TEXT_LENGTH, has_high_noise, latent_size, traits
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """The noise scheduler's own sigmas, shifted by flow_shift."""
    noise_scheduler = new_noise_scheduler(components, request.flow_shift)
    noise_scheduler.set_timesteps(request.num_inference_steps, device=components.device)
    return start_schedule(noise_scheduler, request)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise (num_outputs, C, F, h, w) in float32, in which noise schedulers take their steps.

    A first frame that is given is there from the beginning: `predict` sees to it that it stays.
    """
    size = latent_size(request, components.checkpoint)
    noise = draw_noise((_num_channels(components), *size), generators, torch.float32)
    if (first_frame := inputs.get("first_frame")) is not None:
        noise[:, :, :1] = first_frame.to(noise)
    return noise.to(components.device)


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """encoder_hidden_states (1, L, D), and what the checkpoint wants of pictures, all zeros."""
    checkpoint, config = components.checkpoint, components["transformer"].config
    has = traits(checkpoint)
    frames, *sides = latent_size(request, checkpoint)
    inputs = {
        "encoder_hidden_states": torch.zeros(
            1, TEXT_LENGTH if has.has_clip else request.max_sequence_length, config.text_dim
        )
    }
    if request.num_images and has.keeps_first_frame:
        inputs["first_frame"] = torch.zeros(1, _num_channels(components), 1, *sides)
    elif request.num_images:
        inputs["condition"] = torch.zeros(1, config.in_channels - _num_channels(components), frames, *sides)
    if has.has_clip:
        clip = checkpoint.config("image_encoder")
        length = (clip["image_size"] // clip["patch_size"]) ** 2 + 1
        inputs["encoder_hidden_states_image"] = torch.zeros(1, request.num_images * length, config.image_dim)
    return inputs


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, C, F, h, w) at latents of that shape, row i at timesteps[i].

    Rows of high noise go to one transformer and those of low noise to the other, where there are two.
    """
    is_high = has_high_noise(timesteps, components.checkpoint)
    prediction: torch.Tensor | None = None
    for name, wanted in (("transformer", True), ("transformer_2", False)):
        rows = [index for index, high in enumerate(is_high) if high == wanted]
        if not rows:
            continue
        part = _predict(
            components[name],
            latents[rows],
            timesteps[rows],
            {key: tensor[rows] for key, tensor in conditioning.items()},
            components.dtype,
        )
        if len(rows) == len(latents):
            return part
        prediction = part.new_empty(len(latents), *part.shape[1:]) if prediction is None else prediction
        prediction[rows] = part
    assert prediction is not None
    return prediction


def _num_channels(components: Components) -> int:
    """Channels of the latents; the transformer may take more, those of a condition."""
    config = components["transformer"].config
    return int(config.out_channels or config.in_channels)


def _predict(
    transformer: Any,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    condition = conditioning.get("condition")
    pictures = conditioning.get("encoder_hidden_states_image")
    if pictures is not None and transformer.config.pos_embed_seq_len is not None:
        # It puts first and last picture of a row together itself.
        pictures = pictures.unflatten(1, (2, -1)).flatten(0, 1)
    keeps_first_frame = "first_frame" in conditioning
    prediction: torch.Tensor = transformer(
        hidden_states=latents.to(dtype) if condition is None else torch.cat([latents.to(dtype), condition], dim=1),
        timestep=_token_timesteps(transformer, latents, timesteps) if keeps_first_frame else timesteps,
        encoder_hidden_states=conditioning["encoder_hidden_states"],
        encoder_hidden_states_image=pictures,
        return_dict=False,
    )[0]
    if keeps_first_frame:
        # Without velocity, the frame stays what it is, through any sampler of flow matching. WanImageToVideoPipeline
        # lets it go astray instead, and puts it back at every step and at the end.
        prediction[:, :, 0] = 0
    return prediction


def _token_timesteps(transformer: Any, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """A timestep a token (B, S), that of the first frame's tokens 0: they are clean."""
    _, _, frames, height, width = latents.shape
    frame_step, *sides = transformer.config.patch_size
    tokens = (height // sides[0]) * (width // sides[1])
    by_token = timesteps[:, None].repeat(1, frames // frame_step * tokens)
    by_token[:, :tokens] = 0
    return by_token
