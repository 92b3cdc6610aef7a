"""The state of a row of denoising, taken apart and put together again, with every noise scheduler of diffusers."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from triton_diffusion.errors import StageError
from triton_diffusion.stages.base import DenoiseRow
from triton_diffusion.stages.denoising import _model_input, _step_arguments
from triton_diffusion.stages.row_state import RowStates, UnknownStateError, restore_rows
from triton_diffusion.state import read_metadata

STEPS = 7
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
NOISE_SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler sde": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "EDMDPMSolverMultistepScheduler": {},
    "EDMEulerScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerDiscreteScheduler karras": {"use_karras_sigmas": True},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler stochastic": {"stochastic_sampling": True},
    "FlowMatchHeunDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "IPNDMScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LCMScheduler": {},
    "PNDMScheduler": {},
    "PNDMScheduler without Runge and Kutta": {"skip_prk_steps": True},
    "SASolverScheduler": {},
    "TCDScheduler": {},
    "UniPCMultistepScheduler": {},
    "UniPCMultistepScheduler flow": FLOW | {"solver_order": 3},
}


def make_row(name: str = "UniPCMultistepScheduler", options: dict[str, Any] | None = None) -> DenoiseRow:
    """A row at its first step."""
    noise_scheduler = getattr(diffusers, name.split()[0])(**options or {})
    noise_scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(3)
    return DenoiseRow(
        key="r/0",
        latents=torch.randn(1, 4, 6, 6, generator=generator),
        noise_scheduler=noise_scheduler,
        timesteps=noise_scheduler.timesteps,
        conditioning={},
        negative_conditioning=None,
        shared={},
        guidance_scales=[],
        preview_interval=0,
        generator=generator,
    )


def run(row: DenoiseRow, until: int) -> None:
    """Steps with a model that sees its latents and its timestep."""
    while row.step < until:
        timestep = row.timesteps[row.step]
        prediction = torch.sin(3 * _model_input(row)) + 1e-3 * float(timestep)
        row.latents = row.noise_scheduler.step(
            prediction, timestep, row.latents, return_dict=False, **_step_arguments(row)
        )[0]
        row.step += 1


@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_a_row_that_goes_on_elsewhere_ends_with_the_very_same_latents(name: str) -> None:
    undisturbed = make_row(name, NOISE_SCHEDULERS[name])
    steps = len(undisturbed.timesteps)
    run(undisturbed, steps)
    for step in (1, 2, steps // 2, steps - 1):
        row, other = (make_row(name, NOISE_SCHEDULERS[name]) for _ in range(2))
        run(row, step)
        states = RowStates([row])
        # The copy does not change with what it is a copy of.
        run(row, steps)
        restore_rows([other], states.pack())
        assert other.step == step
        run(other, steps)
        error = (other.latents - undisturbed.latents).abs().max().item()
        print(f"{name} from step {step} of {steps}: largest error {error}")
        assert torch.equal(other.latents, undisturbed.latents)
        assert torch.equal(other.generator.get_state(), undisturbed.generator.get_state())


def test_what_a_fresh_noise_scheduler_has_too_is_not_copied() -> None:
    row = make_row()
    run(row, 3)
    blob = RowStates([row]).pack()
    (state,) = json.loads(read_metadata(blob)[0]["rows"])
    assert {"alphas_cumprod", "betas", "sigmas", "timesteps"}.isdisjoint(state["noise_scheduler"])
    assert {"model_outputs", "last_sample", "_step_index"} < state["noise_scheduler"].keys()
    # Latents, two model outputs, the last sample, and the state of a generator, 5 KB.
    assert len(blob) < 4 * row.latents.nbytes + 5056 + 2500


def test_a_tensor_under_two_names_is_copied_once() -> None:
    row = make_row()
    row.preview = row.noise_scheduler.last_sample = row.latents
    assert len(load(RowStates([row]).pack())) == 2


def test_numbers_of_numpy_pairs_and_dicts_come_back_as_they_were() -> None:
    row, other = make_row(), make_row()
    values = {"a": np.float64(0.1), "b": (1, None, "x"), "c": {2: [1.5, True]}, "d": np.arange(3)}
    row.noise_scheduler.kept = values
    restore_rows([other], RowStates([row]).pack())
    kept = other.noise_scheduler.kept
    assert (kept.keys(), type(kept["a"]), kept["a"], kept["b"], kept["c"]) == (
        values.keys(),
        np.float64,
        0.1,
        values["b"],
        values["c"],
    )
    assert (kept["d"] == np.arange(3)).all()


def test_what_cannot_be_copied_is_said() -> None:
    row = make_row()
    row.noise_scheduler.noise_sampler = object()
    with pytest.raises(UnknownStateError, match="no way to copy a object"):
        RowStates([row])


def with_rows(blob: bytes, **changes: Any) -> bytes:
    (state,) = json.loads(read_metadata(blob)[0]["rows"])
    return save(load(blob), {"rows": json.dumps([state | changes])})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda blob: b"",
        lambda blob: blob[:-1],
        lambda blob: save(load(blob), {"rows": "[]"}),
        lambda blob: save(load(blob), {"rows": "["}),
        lambda blob: save(load(blob)),
        lambda blob: with_rows(blob, step=99),
        lambda blob: with_rows(blob, step="1"),
        lambda blob: with_rows(blob, latents={"tensor": 77, "on_cpu": True}),
        lambda blob: with_rows(blob, latents=None),
        lambda blob: with_rows(blob, generator=3),
        lambda blob: with_rows(blob, noise_scheduler={"x": {"object": 1}}),
        lambda blob: with_rows(blob, noise_scheduler=[]),
    ],
)
def test_a_broken_blob_is_the_error_of_its_request(spoil: Any) -> None:
    row = make_row()
    run(row, 2)
    with pytest.raises(StageError, match="does not fit its request"):
        restore_rows([make_row()], spoil(RowStates([row]).pack()))
