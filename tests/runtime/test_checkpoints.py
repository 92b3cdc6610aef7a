"""Requests that go on from a checkpoint, on ranks that have never seen them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from checkpoints.families import CASES, SMALL, FamilyCase
from checkpoints.parity import assert_close
from checkpoints.requests import make_request
from checkpoints.stages import InProcessStages, Picture
from triton_diffusion.request import GenerationRequest
from triton_diffusion.runtime.messages import Checkpoint
from triton_diffusion.runtime.work import rows_and_steps

PICTURE = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)


def run_until_checkpoint(stages: InProcessStages, request_id: str, num_rows: int) -> Checkpoint:
    """Ticks of all rows until there is a checkpoint; then the request is lost."""
    for _ in range(20):
        done = stages.tick("denoising", [(request_id, index) for index in range(num_rows)])
        assert not done.failed, done.failed
        assert request_id not in done.results, "it ended without a checkpoint"
        if request_id in done.checkpoints:
            stages.executors["denoising"].drop(request_id)
            return done.checkpoints[request_id]
    raise AssertionError("no checkpoint in 20 ticks")


def run_to_end(stages: InProcessStages, request_id: str, steps: list[int]) -> torch.Tensor:
    """The latents of a request whose rows have so many steps left; each is run so often, and not once more."""
    while any(steps):
        done = stages.tick("denoising", [(request_id, index) for index, left in enumerate(steps) if left])
        assert not done.failed, done.failed
        steps = [max(0, left - 1) for left in steps]
        assert (request_id in done.results) == (not any(steps))
    return load(done.results[request_id])["latents"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_family_draws_the_same_from_a_checkpoint(case: FamilyCase, tmp_path: Path) -> None:
    stages = InProcessStages(case.build(tmp_path / "checkpoint"), checkpoint_steps=2)
    options = SMALL | case.options | {"num_inference_steps": 6, "num_images": case.num_images}
    request = make_request(**options)
    images: list[Picture] = [PICTURE] * case.num_images
    blob = stages.encode("r", request, images)
    undisturbed = stages.latents(request, images=images)
    stages.admit("denoising", "r", blob)
    checkpoint = run_until_checkpoint(stages, "r", 1)
    assert checkpoint.done == [2]
    total = rows_and_steps("denoising", stages.family, stages.checkpoint, request)[1]
    stages.admit("denoising", "r", blob, checkpoint.state)
    resumed = run_to_end(stages, "r", [total - 2])
    error = (resumed - undisturbed).abs().max().item()
    print(f"largest error {error}, checkpoint of {len(checkpoint.state)} bytes")
    assert torch.equal(resumed, undisturbed)


@pytest.fixture(scope="module")
def stages(flux_checkpoint: Path) -> InProcessStages:
    return InProcessStages(flux_checkpoint, checkpoint_steps=3)


def admit(stages: InProcessStages, request_id: str, request: GenerationRequest) -> bytes:
    blob = stages.encode(request_id, request)
    stages.admit("denoising", request_id, blob)
    return blob


def test_rows_at_different_steps_go_on_each_from_its_own(stages: InProcessStages) -> None:
    request = make_request(num_inference_steps=8, num_outputs=2)
    blob = admit(stages, "rows", request)
    for rows in ([0], [0], [0, 1], [0]):
        stages.tick("denoising", [("rows", index) for index in rows])
    checkpoint = run_until_checkpoint(stages, "rows", 2)
    assert checkpoint.done == [5, 2]
    stages.admit("denoising", "rows", blob, checkpoint.state)
    # Alone or together, rows differ by rounding.
    assert_close(run_to_end(stages, "rows", [3, 6]), stages.latents(request))


def test_there_is_a_checkpoint_every_so_many_steps_until_the_request_ends(stages: InProcessStages) -> None:
    admit(stages, "steps", make_request(num_inference_steps=9))
    seen = {}
    for step in range(1, 10):
        done = stages.tick("denoising", [("steps", 0)])
        if "steps" in done.checkpoints:
            seen[step] = done.checkpoints["steps"].done
    assert seen == {4: [3], 7: [6]}, "a tick later, and none of a request that is through"


def test_previews_come_at_the_same_steps_after_a_resume(stages: InProcessStages) -> None:
    blob = admit(stages, "previews", make_request(num_inference_steps=9, preview_interval=2))
    checkpoint = run_until_checkpoint(stages, "previews", 1)
    stages.admit("denoising", "previews", blob, checkpoint.state)
    steps = [step for step in range(4, 10) if stages.tick("denoising", [("previews", 0)]).previews]
    assert steps == [4, 6, 8]


def test_a_request_that_was_cancelled_leaves_no_checkpoint(stages: InProcessStages) -> None:
    admit(stages, "gone", make_request(num_inference_steps=9))
    for _ in range(3):
        stages.tick("denoising", [("gone", 0)])
    stages.executors["denoising"].drop("gone")
    admit(stages, "gone", make_request(num_inference_steps=9))
    assert not stages.tick("denoising", [("gone", 0)]).checkpoints


def test_the_reference_loop_has_none(stages: InProcessStages) -> None:
    admit(stages, "loop", make_request(num_inference_steps=9))
    assert not stages.tick("denoising", [("loop", 0)], 9).checkpoints
    assert not stages.executors["denoising"]._copied


def checkpoint_of(stages: InProcessStages, request: GenerationRequest) -> bytes:
    admit(stages, "other", request)
    return run_until_checkpoint(stages, "other", request.num_outputs).state


@pytest.mark.parametrize("broken", ["no safetensors", "of another size", "of fewer rows"])
def test_a_request_whose_checkpoint_is_broken_begins_anew(
    stages: InProcessStages, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = make_request(num_inference_steps=6, num_outputs=2, seed=5)
    checkpoint = {
        "no safetensors": lambda: b"no safetensors",
        "of another size": lambda: checkpoint_of(stages, make_request(num_inference_steps=9, height=64, num_outputs=2)),
        "of fewer rows": lambda: checkpoint_of(stages, make_request(num_inference_steps=9)),
    }[broken]()
    stages.admit("denoising", "broken", stages.encode("broken", request), checkpoint)
    done = stages.tick("denoising", [("broken", 0), ("broken", 1)])
    assert not done.failed
    assert done.began_anew == ["broken"]
    assert "request broken begins anew, not at its checkpoint: a checkpoint does not fit its request" in caplog.text
    assert torch.equal(run_to_end(stages, "broken", [5, 5]), stages.latents(request))


def test_no_checkpoint_is_made_where_there_shall_be_none(flux_checkpoint: Path) -> None:
    stages = InProcessStages(flux_checkpoint)
    admit(stages, "none", make_request(num_inference_steps=9))
    for _ in range(9):
        assert not stages.tick("denoising", [("none", 0)]).checkpoints
