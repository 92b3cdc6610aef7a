"""What families share about noise schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from triton_diffusion.families.base import Schedule, kept_steps
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def new_noise_scheduler(components: Components, flow_shift: float | None = None) -> Any:
    """A noise scheduler of its own for one row, of the class and configuration that the checkpoint names.

    flow_shift: replaces the checkpoint's, under the name that its class has for it.
    """
    config = dict(components["scheduler"].config)
    if flow_shift is not None:
        for name in ("flow_shift", "shift"):
            if name in config:
                config[name] = flow_shift
    return type(components["scheduler"]).from_config(config)


def start_schedule(noise_scheduler: Any, request: GenerationRequest) -> Schedule:
    """The schedule of a scheduler that has its timesteps; `strength` leaves out the first, as img2img pipelines do."""
    steps = request.num_inference_steps
    kept = kept_steps(type(noise_scheduler).__name__, steps, request.strength)
    start = (steps - kept) * int(getattr(noise_scheduler, "order", 1))
    if hasattr(noise_scheduler, "set_begin_index"):
        noise_scheduler.set_begin_index(start)
    return Schedule(noise_scheduler, noise_scheduler.timesteps[start:])


def flow_match_schedule(
    components: Components, request: GenerationRequest, image_seq_len: int, mu: float | None = None
) -> Schedule:
    """Sigmas from 1 down to 1 / steps, shifted for the number of image tokens: FLUX, Qwen-Image and their kin.

    mu: the shift, where a family has a rule of its own.
    """
    noise_scheduler = new_noise_scheduler(components, request.flow_shift)
    config, steps = noise_scheduler.config, request.num_inference_steps
    sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    if mu is None:
        mu = resolution_shift(config, image_seq_len)
    noise_scheduler.set_timesteps(steps, device=components.device, sigmas=sigmas, mu=mu)
    return start_schedule(noise_scheduler, request)


def resolution_shift(config: Mapping[str, Any], image_seq_len: int) -> float:
    """mu, linear in the number of image tokens: large pictures stay longer at high noise (calculate_shift)."""
    base_len, max_len = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_len - base_len)
    mu: float = base_shift + slope * (image_seq_len - base_len)
    return mu


def clean_estimate(noise_scheduler: Any, index: int, latents: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """What the latents would be without noise, as the model sees it at timestep `index` of the schedule: for previews.

    With x = alpha * x0 + sigma * noise, the prediction is the noise, v = alpha * noise - sigma * x0 (Salimans and Ho
    2022, arXiv:2202.00512), x0 itself, or the velocity noise - x0 of flow matching, where alpha = 1 - sigma (Lipman et
    al. 2023, arXiv:2210.02747).
    """
    config = noise_scheduler.config
    kind = config.get("prediction_type", "epsilon")
    flows = "FlowMatch" in type(noise_scheduler).__name__ or kind == "flow_prediction"
    if kind == "sample":
        return prediction
    if hasattr(noise_scheduler, "precondition_outputs"):
        # That of Karras et al. 2022 (EDM, arXiv:2206.00364) weighs latents and prediction by itself.
        preconditioned: torch.Tensor = noise_scheduler.precondition_outputs(
            latents, prediction, noise_scheduler.sigmas[index].to(latents)
        )
        return preconditioned
    if flows:
        estimate: torch.Tensor = latents - noise_scheduler.sigmas[index].to(latents) * prediction
        return estimate
    if hasattr(noise_scheduler, "sigmas"):
        ratio = noise_scheduler.sigmas[index].to(latents)
        # But for DPM-Solver's kin, they keep x / alpha (k-diffusion's form), and divide it before the model sees it.
        alpha = 1 / (ratio**2 + 1).sqrt()
        scaled = latents if hasattr(noise_scheduler, "_sigma_to_alpha_sigma_t") else latents * alpha
    else:
        cumulative = noise_scheduler.alphas_cumprod[noise_scheduler.timesteps[index].long().cpu()].to(latents)
        alpha, scaled = cumulative.sqrt(), latents
        ratio = (1 - cumulative).sqrt() / alpha
    sigma = ratio * alpha
    clean: torch.Tensor = (
        alpha * scaled - sigma * prediction if kind == "v_prediction" else (scaled - sigma * prediction) / alpha
    )
    return clean
