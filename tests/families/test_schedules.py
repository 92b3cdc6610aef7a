"""What families share about noise schedules, against the noise schedulers of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from checkpoints.requests import make_request
from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import num_timesteps
from triton_diffusion.families.schedules import clean_estimate, start_schedule
from triton_diffusion.loading.checkpoint import Checkpoint

SPACINGS: list[dict[str, Any]] = [{"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")]
KARRAS: dict[str, Any] = {"use_karras_sigmas": True}
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    *(("DDIMScheduler", spacing) for spacing in SPACINGS),
    *(("PNDMScheduler", {"skip_prk_steps": True} | spacing) for spacing in SPACINGS[:2]),
    *((f"{name}DiscreteScheduler", config) for name in ("Euler", "Heun") for config in (*SPACINGS, KARRAS)),
    *((f"{name}MultistepScheduler", config) for name in ("DPMSolver", "UniPC") for config in (*SPACINGS, KARRAS)),
    ("EulerAncestralDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DDPMScheduler", {}),
    ("LCMScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {}),
]


def save_scheduler(name: str, config: dict[str, Any], folder: Path) -> tuple[Checkpoint, Any]:
    """A checkpoint that has nothing but a noise scheduler."""
    noise_scheduler = getattr(diffusers, name)(**config)
    noise_scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", name]}))
    return Checkpoint(folder), noise_scheduler


@pytest.mark.parametrize(("name", "config"), SCHEDULERS, ids=str)
def test_timesteps_are_counted_as_the_noise_scheduler_makes_them(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    checkpoint, noise_scheduler = save_scheduler(name, config, tmp_path)
    for steps in (1, 2, 3, 4, 5, 6, 20):
        noise_scheduler.set_timesteps(steps)
        for strength in (None, 0.01, 0.3, 0.5, 0.8, 1.0):
            request = make_request(num_inference_steps=steps, strength=strength)
            made = len(start_schedule(noise_scheduler, request).timesteps)
            assert num_timesteps(checkpoint, steps, strength) == made > 0, (steps, strength)


@pytest.mark.parametrize("steps", [4, 5, 20])
def test_steps_of_runge_and_kutta_are_counted(tmp_path: Path, steps: int) -> None:
    checkpoint, noise_scheduler = save_scheduler("PNDMScheduler", {}, tmp_path)
    noise_scheduler.set_timesteps(steps)
    assert num_timesteps(checkpoint, steps, None) == len(noise_scheduler.timesteps) == steps + 9


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_too_few_steps_for_those_of_runge_and_kutta_are_the_callers_mistake(tmp_path: Path, steps: int) -> None:
    checkpoint, noise_scheduler = save_scheduler("PNDMScheduler", {}, tmp_path)
    with pytest.raises(ValueError, match="broadcast"):
        noise_scheduler.set_timesteps(steps)
    with pytest.raises(InvalidRequestError, match=f"num_inference_steps={steps} must be at least 4"):
        num_timesteps(checkpoint, steps, None)


ESTIMATED = [
    ("DDIMScheduler", "v_prediction"),
    *(
        (name, kind)
        for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")
        for kind in ("epsilon", "v_prediction")
    ),
    ("EulerAncestralDiscreteScheduler", "epsilon"),
    ("KDPM2DiscreteScheduler", "epsilon"),
    ("DPMSolverMultistepScheduler", "epsilon"),
    ("UniPCMultistepScheduler", "v_prediction"),
]


@pytest.mark.parametrize(("name", "kind"), ESTIMATED)
@pytest.mark.parametrize("index", [0, 3, 8])
def test_of_a_perfect_prediction_the_clean_estimate_is_the_clean_latents(name: str, kind: str, index: int) -> None:
    noise_scheduler = getattr(diffusers, name)(prediction_type=kind, beta_start=0.00085, beta_end=0.012)
    noise_scheduler.set_timesteps(10)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    timestep = noise_scheduler.timesteps[index : index + 1]
    latents = noise_scheduler.add_noise(clean, noise, timestep)
    seen = noise_scheduler.scale_model_input(latents, timestep[0])
    # alpha and sigma of what the model sees, from the three tensors.
    alpha, sigma = torch.linalg.lstsq(torch.stack([clean.flatten(), noise.flatten()], 1), seen.flatten()).solution
    prediction = alpha * noise - sigma * clean if kind == "v_prediction" else noise
    estimate = clean_estimate(noise_scheduler, index, latents, prediction)
    assert (estimate - clean).abs().max() < 1e-3
    assert (latents - clean).abs().max() > 0.05


def test_of_a_network_of_edm_the_clean_estimate_weighs_latents_and_prediction() -> None:
    """D = c_skip x + c_out F (Karras et al. 2022, arXiv:2206.00364, table 1)."""
    noise_scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_data=0.5)
    noise_scheduler.set_timesteps(10)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = noise_scheduler.sigmas[4]
    latents = clean + sigma * noise
    skip, out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    estimate = clean_estimate(noise_scheduler, 4, latents, (clean - skip * latents) / out)
    assert (estimate - clean).abs().max() < 1e-4
