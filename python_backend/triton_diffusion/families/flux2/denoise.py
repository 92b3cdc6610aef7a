"""FLUX.2 denoising: noise, schedule and one forward pass, each as diffusers' Flux2Pipeline does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from triton_diffusion.families.base import Schedule
from triton_diffusion.families.flux2.family import pixels_per_token
from triton_diffusion.families.latents import draw_noise
from triton_diffusion.families.schedules import flow_match_schedule
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# The transformer multiplies its timestep argument by this; noise schedulers count timesteps from 0 to 1000.
TIMESTEP_SCALE = 1000
# Between the numbers that pictures have among the position ids; that which is drawn has 0.
PICTURE_STRIDE = 10


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Sigmas shifted for the length of the image sequence and the number of steps."""
    height, width = _token_grid(components, request)
    mu = empirical_shift(height * width, request.num_inference_steps)
    return flow_match_schedule(components, request, height * width, mu)


def empirical_shift(image_seq_len: int, num_inference_steps: int) -> float:
    """The shift, mu, by lines fitted for 10 and for 200 steps (compute_empirical_mu in pipeline_flux2.py)."""
    at_200 = 0.00016927 * image_seq_len + 0.45666666
    if image_seq_len > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_seq_len + 1.89833333
    slope = (at_200 - at_10) / 190
    return at_200 + slope * (num_inference_steps - 200)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise (num_outputs, S, C) in the compute dtype, drawn as (C, h, w)."""
    shape = (components["transformer"].config.in_channels, *_token_grid(components, request))
    noise = draw_noise(shape, generators, components.dtype)
    return noise.flatten(2).transpose(1, 2).to(components.device)


def shared_inputs(
    components: Components, request: GenerationRequest, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Position ids of the image tokens (1, S, 4), those of the pictures beside behind, and of the text (1, L, 4)."""
    grids = [_token_grid(components, request)]
    grids += [(latents.shape[1], latents.shape[2]) for latents in _beside(inputs)]
    pictures = [_position_ids(PICTURE_STRIDE * index, height, width) for index, (height, width) in enumerate(grids)]
    text = torch.zeros(request.max_sequence_length, 4, dtype=torch.int64)
    text[:, 3] = torch.arange(request.max_sequence_length)
    ids = {"img_ids": torch.cat(pictures), "txt_ids": text}
    return {name: tensor[None].to(components.device) for name, tensor in ids.items()}


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, L, D), zeros."""
    width = components["transformer"].config.joint_attention_dim
    return {"prompt_embeds": torch.zeros(1, request.max_sequence_length, width)}


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, S, C) at latents (B, S, C), row i at timesteps[i]."""
    transformer = components["transformer"]
    beside = [picture.flatten(1, 2) for picture in _beside(conditioning)]
    prediction: torch.Tensor = transformer(
        hidden_states=torch.cat([latents, *beside], dim=1),
        timestep=timesteps.to(latents.dtype) / TIMESTEP_SCALE,
        guidance=conditioning["embedded_guidance_scale"] if transformer.config.guidance_embeds else None,
        encoder_hidden_states=conditioning["prompt_embeds"],
        txt_ids=shared["txt_ids"],
        img_ids=shared["img_ids"],
        return_dict=False,
    )[0]
    return prediction[:, : latents.shape[1]]


def _beside(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Latents (B, h, w, C) of the pictures that stand beside, in their order."""
    names = (f"image_latents_{index}" for index in range(len(tensors)))
    return [tensors[name] for name in names if name in tensors]


def _position_ids(number: int, height: int, width: int) -> torch.Tensor:
    """(height * width, 4): the number of the picture, row and column of each token; text has the fourth."""
    ids = torch.zeros(height, width, 4, dtype=torch.int64)
    ids[..., 0] = number
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.reshape(-1, 4)


def _token_grid(components: Components, request: GenerationRequest) -> tuple[int, int]:
    size = pixels_per_token(components.checkpoint)
    return request.height // size, request.width // size
