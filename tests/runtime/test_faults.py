"""What a service does about requests that kill their ranks, ranks that hang, and ranks that do not start again."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from checkpoints.reference import Reference
from checkpoints.requests import make_request
from checkpoints.services import Caller, error_of, result_of, run_service
from checkpoints.stages import InProcessStages
from checkpoints.timing import wait_until
from triton_diffusion.errors import StageError, WorkerGroupError
from triton_diffusion.request import GenerationRequest

POISON, SLEEPER = "a cup of hemlock", "a dormouse"
FOREVER = 100_000


@pytest.fixture(scope="module")
def denoising(flux_checkpoint: Path) -> Iterator[Caller]:
    """One replica, whose ranks die of one prompt and fall asleep over another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DIFFUSION_FAULTS", f"stage=denoising;kill_prompt={POISON};hang_prompt={SLEEPER}")
        with run_service("denoising", flux_checkpoint, watchdog_floor_s=1.0, watchdog_ceiling_s=3.0) as caller:
            yield caller


def assert_latents(blob: bytes, request: GenerationRequest, reference: Reference) -> None:
    assert (load(blob)["latents"] - torch.as_tensor(reference.latents(request))).abs().max() < 1e-4


def test_a_request_that_kills_its_ranks_is_given_up_and_the_others_are_drawn(
    denoising: Caller, in_process: InProcessStages, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "triton_diffusion.runtime.service")
    before = denoising.service.metrics()
    requests = {f"innocent-{seed}": make_request(num_inference_steps=30, seed=seed) for seed in range(3)}
    blobs = {request_id: in_process.encode(request_id, request) for request_id, request in requests.items()}
    poison = in_process.encode("poison", make_request(prompt=POISON, num_inference_steps=30))
    futures = {request_id: denoising.send(blob) for request_id, blob in blobs.items()}
    error = error_of(denoising.send(poison))
    assert isinstance(error, StageError)
    assert "died 3 times at the same steps of this request" in str(error)
    for request_id, future in futures.items():
        assert_latents(result_of(future), requests[request_id], reference)
    after = denoising.service.metrics()
    assert after.restarts_total - before.restarts_total == 3
    assert after.requests_given_up_total - before.requests_given_up_total == 1
    lines = [record.message for record in caplog.records if "signal 9" in record.message]
    assert len(lines) == 3, "one line a fault"
    assert all("rank 0" in line and "poison" in line for line in lines)
    assert "alone" in lines[1]
    assert "given up: poison" in lines[2]
    assert POISON not in caplog.text


@pytest.mark.parametrize("when", ["while it works", "while it is idle"])
def test_a_rank_that_was_stopped_is_replaced(
    denoising: Caller, in_process: InProcessStages, reference: Reference, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    wait_until(lambda: denoising.service._replicas[0].ready)
    request = make_request(num_inference_steps=400, seed=3)
    blob = in_process.encode(f"stopped {when}", request)
    (pid,) = denoising.pids()
    if when == "while it is idle":
        os.kill(pid, signal.SIGSTOP)
        future = denoising.send(blob)
    else:
        future = denoising.send(blob)
        denoising.progress(f"stopped {when}", 20)
        os.kill(pid, signal.SIGSTOP)
    assert_latents(result_of(future), request, reference)
    assert pid not in denoising.pids()
    assert "rank 0 was stopped by a signal" in caplog.text


def test_a_rank_that_was_stopped_while_it_loads_is_replaced(
    denoising: Caller, in_process: InProcessStages, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    wait_until(lambda: denoising.service._replicas[0].ready)
    request = make_request(seed=4)
    before = denoising.pids()
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: denoising.pids() not in ([], before))
    (loading,) = denoising.pids()
    os.kill(loading, signal.SIGSTOP)
    assert_latents(denoising.run(in_process.encode("patient", request)), request, reference)
    assert loading not in denoising.pids()
    assert "rank 0 was stopped by a signal while it loaded" in caplog.text


def test_a_request_over_which_ranks_hang_is_given_up(denoising: Caller, in_process: InProcessStages) -> None:
    before = denoising.service.metrics().watchdog_kills_total
    error = error_of(denoising.send(in_process.encode("sleeper", make_request(prompt=SLEEPER))))
    assert isinstance(error, StageError)
    assert "its ranks are stuck" in str(error)
    assert denoising.service.metrics().watchdog_kills_total == before + 3


def test_a_crash_loop_refuses_requests_until_a_group_starts_again(
    flux_checkpoint: Path, tmp_path: Path, in_process: InProcessStages, reference: Reference
) -> None:
    checkpoint = shutil.copytree(flux_checkpoint, tmp_path / "checkpoint")
    (weights,) = (checkpoint / "transformer").glob("*.safetensors")
    hidden = weights.with_suffix(".away")
    request = make_request(seed=8)
    with run_service("denoising", checkpoint, crash_loop_restarts=2) as caller:
        running = caller.send(in_process.encode("running", make_request(num_inference_steps=FOREVER)))
        caller.progress("running", 3)
        assert caller.health().ready
        weights.rename(hidden)
        os.kill(caller.pids()[0], signal.SIGKILL)
        error = error_of(running)
        assert isinstance(error, WorkerGroupError)
        assert "died 2 times in a row (replica 0: its ranks could not load)" in str(error)
        assert str(tmp_path) not in str(error)
        refused = error_of(caller.send(in_process.encode("refused", request)))
        assert isinstance(refused, WorkerGroupError)
        health = caller.health()
        assert (health.ready, health.ready_replicas, health.num_replicas) == (False, 0, 1)
        assert "are started again in" in health.reason
        hidden.rename(weights)
        wait_until(lambda: caller.health().ready)
        assert_latents(caller.run(in_process.encode("taken", request)), request, reference)
        assert caller.health().reason == ""
