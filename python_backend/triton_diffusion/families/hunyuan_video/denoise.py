"""HunyuanVideo denoising: noise, schedule and one forward pass, each as diffusers' HunyuanVideo pipelines do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from triton_diffusion.families.base import Schedule
from triton_diffusion.families.hunyuan_video.family import PICTURE_TOKENS_KEPT, image_condition, latent_size
from triton_diffusion.families.latents import draw_noise
from triton_diffusion.families.schedules import new_noise_scheduler, start_schedule
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# The transformer was trained with the embedded guidance scale on the scale of the timesteps.
GUIDANCE_FACTOR = 1000.0
# How much of the noise there is at the start, beside the picture in every frame.
NOISE_BESIDE_PICTURE = 0.999


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Sigmas from 1 down to 1 / steps, with a shift that is the same for all sizes."""
    noise_scheduler = new_noise_scheduler(components, request.flow_shift)
    sigmas = np.linspace(1.0, 0.0, request.num_inference_steps + 1)[:-1]
    noise_scheduler.set_timesteps(sigmas=sigmas, device=components.device)
    return start_schedule(noise_scheduler, request)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise (num_outputs, C, F, H, W) in float32, which the first step makes the compute dtype of.

    A picture shows through it in every frame. As the first frame it is there without noise: `predict` sees to it that
    it stays.
    """
    size = latent_size(components.checkpoint, request)
    latents = draw_noise((_num_channels(components), *size), generators, torch.float32)
    if (picture := inputs.get("image_latents")) is not None:
        picture = picture.to(latents)
        share = torch.tensor([NOISE_BESIDE_PICTURE])
        latents = latents * share + picture * (1 - share)
        if image_condition(components.checkpoint) == "token_replace":
            latents[:, :, :1] = picture
    return latents.to(components.device)


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, L, D), pooled_prompt_embeds (1, P), both zeros, and prompt_attention_mask (1, L), all True.

    With a picture also image_latents (1, C, 1, H, W), zeros. A mask that hides all would make the mean over the prompt
    a division by zero.
    """
    checkpoint, config = components.checkpoint, components["transformer"].config
    length = request.max_sequence_length + (PICTURE_TOKENS_KEPT if request.num_images else 0)
    inputs = {
        "prompt_embeds": torch.zeros(1, length, config.text_embed_dim),
        "pooled_prompt_embeds": torch.zeros(1, config.pooled_projection_dim),
        "prompt_attention_mask": torch.ones(1, length, dtype=torch.bool),
    }
    if request.num_images:
        _, *sides = latent_size(checkpoint, request)
        inputs["image_latents"] = torch.zeros(1, _num_channels(components), 1, *sides)
    return inputs


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, C, F, H, W) at latents (B, C, F, H, W), row i at timesteps[i]."""
    transformer, dtype = components["transformer"], components.dtype
    condition = image_condition(components.checkpoint)
    if condition == "latent_concat":
        latents = _with_picture(latents, conditioning["image_latents"])
    # Both are rounded to the compute dtype, as in the pipelines: all but the timesteps beside a first frame, which
    # keeps the pipeline's latents, whose dtype theirs is, in float32.
    timesteps = timesteps if condition == "token_replace" else timesteps.to(dtype)
    prediction: torch.Tensor = transformer(
        hidden_states=latents.to(dtype),
        timestep=timesteps,
        guidance=conditioning["embedded_guidance_scale"].to(dtype) * GUIDANCE_FACTOR,
        encoder_hidden_states=conditioning["prompt_embeds"],
        encoder_attention_mask=conditioning["prompt_attention_mask"],
        pooled_projections=conditioning["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    if condition == "token_replace":
        # Without velocity, the frame stays what it is, through any sampler of flow matching.
        prediction[:, :, 0] = 0
    return prediction


def _num_channels(components: Components) -> int:
    """Channels of the latents; the transformer may take more, those of a picture."""
    config = components["transformer"].config
    return int(config.out_channels or config.in_channels)


def _with_picture(latents: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, F, H, W) and behind them C channels of a picture (B, C, 1, H, W) in the first frame, and one that
    says which frame that is: (B, 2C + 1, F, H, W).
    """
    batch, channels, *size = latents.shape
    condition = latents.new_zeros(batch, channels + 1, *size)
    condition[:, :channels, :1] = picture
    condition[:, channels, 0] = 1
    return torch.cat([latents, condition], dim=1)
