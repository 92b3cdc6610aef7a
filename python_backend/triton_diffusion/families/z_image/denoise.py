"""Z-Image denoising: noise, schedule and one forward pass, each as diffusers' ZImagePipeline does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from triton_diffusion.families.base import Schedule
from triton_diffusion.families.latents import draw_noise, noised_picture
from triton_diffusion.families.schedules import new_noise_scheduler, resolution_shift, start_schedule
from triton_diffusion.families.z_image.family import PATCH_SIZE, vae_scale
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# Noise schedulers count timesteps from 1000 down to 0, the transformer counts from 0 to 1.
LAST_TIMESTEP = 1000


def prepare_schedule(components: Components, request: GenerationRequest) -> Schedule:
    """Sigmas from 1 down to 1 / steps, shifted by a constant, or for the length of the image sequence.

    Evenly spaced in float32, as the pipeline has them: the last bit of a timestep is 1e-5 in the latents.
    """
    noise_scheduler, steps = new_noise_scheduler(components, request.flow_shift), request.num_inference_steps
    size = PATCH_SIZE * vae_scale(components.checkpoint)
    mu = resolution_shift(noise_scheduler.config, (request.height // size) * (request.width // size))
    sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
    noise_scheduler.set_timesteps(sigmas=sigmas, device=components.device, mu=mu)
    return start_schedule(noise_scheduler, request)


def prepare_latents(
    components: Components,
    request: GenerationRequest,
    inputs: Mapping[str, torch.Tensor],
    schedule: Schedule,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Noise (num_outputs, C, h, w), or a picture with noise on it; in float32 whatever the compute dtype."""
    scale = vae_scale(components.checkpoint)
    if "initial_moments" in inputs:
        scaling, shift = (components.checkpoint.setting("vae", f"{name}_factor") for name in ("scaling", "shift"))
        moments = inputs["initial_moments"].cpu()
        return noised_picture(moments, schedule, generators, scaling, shift).float().to(components.device)
    shape = (components["transformer"].config.in_channels, request.height // scale, request.width // scale)
    return draw_noise(shape, generators, torch.float32).to(components.device)


def example_inputs(components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """prompt_embeds (1, L, D), zeros."""
    channels = components["transformer"].config.cap_feat_dim
    return {"prompt_embeds": torch.zeros(1, request.max_sequence_length, channels)}


def predict(
    components: Components,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The velocity (B, C, h, w), float32, at latents (B, C, h, w), row i at timesteps[i].

    The transformer takes lists of rows. It fills up each text to a multiple of its own with a token that it has learnt,
    which is seen; so the positions and the picture depend on the length, and no row may bring padding of ours.
    """
    embeds, mask = conditioning["prompt_embeds"], conditioning.get("prompt_embeds_mask")
    texts = list(embeds)
    if mask is not None:
        texts = [text[:length] for text, length in zip(texts, mask.sum(1).tolist(), strict=True)]
    velocities = components["transformer"](
        list(latents.to(embeds.dtype).unsqueeze(2)),
        (LAST_TIMESTEP - timesteps) / LAST_TIMESTEP,
        texts,
        return_dict=False,
    )[0]
    # It predicts the way from noise to picture, noise schedulers go the other.
    prediction: torch.Tensor = -torch.stack(velocities).squeeze(2).float()
    return prediction
