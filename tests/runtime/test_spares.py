"""A rank that dies is replaced by a process that has been waiting for that."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load

from checkpoints.reference import Reference
from checkpoints.requests import make_request
from checkpoints.services import Caller, result_of, run_service
from checkpoints.stages import InProcessStages
from triton_diffusion.runtime import spares
from triton_diffusion.runtime.rank_main import SPARE_NAME

FOREVER = 100_000


@pytest.fixture
def denoising(flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Caller]:
    """One replica of one rank, which has a spare as soon as it is up."""
    monkeypatch.setattr(spares, "_DELAY_S", 0.0)
    with run_service("denoising", flux_checkpoint, spare_ranks=True) as caller:
        yield caller
    assert not waiting()


def waiting() -> list[int]:
    """Process ids of the spares that this process has started, and that know that they are spares."""
    return [child.pid for child in psutil.Process().children() if child.name() == SPARE_NAME]


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


def test_the_spare_takes_the_place_of_a_rank_that_dies_and_gets_a_spare_itself(
    denoising: Caller, in_process: InProcessStages, reference: Reference
) -> None:
    wait_for(waiting)
    (spare,) = waiting()
    request = make_request(num_inference_steps=200)
    future = denoising.send(in_process.encode("r", request))
    assert denoising.progress("r", 0)[0].step
    os.kill(denoising.pids()[0], signal.SIGKILL)
    latents = load(result_of(future))["latents"]
    assert (latents - torch.as_tensor(reference.latents(request))).abs().max() < 1e-4
    assert denoising.pids() == [spare]
    assert psutil.Process(spare).name() == "rank"
    wait_for(waiting)


def test_a_spare_that_is_dead_or_stopped_is_passed_over(denoising: Caller, in_process: InProcessStages) -> None:
    for signal_number in (signal.SIGKILL, signal.SIGSTOP):
        wait_for(waiting)
        (spare,) = waiting()
        os.kill(spare, signal_number)
        rank = denoising.pids()[0]
        os.kill(rank, signal.SIGKILL)
        wait_for(lambda rank=rank: denoising.health().ready_replicas and denoising.pids() != [rank])
        assert denoising.pids() != [spare]
        assert load(denoising.run(in_process.encode("r", make_request())))


def test_without_spares_there_are_none(flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "_DELAY_S", 0.0)
    with run_service("denoising", flux_checkpoint, spare_ranks=False) as caller:
        children = {child.pid for child in psutil.Process().children() if "rank_main" in " ".join(child.cmdline())}
        assert children == set(caller.pids())
