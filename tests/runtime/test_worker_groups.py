"""Worker groups of several ranks, several replicas, and what happens when their processes die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load, save

from checkpoints.reference import Reference
from checkpoints.requests import make_blob, make_request
from checkpoints.services import Caller, error_of, result_of, run_service, run_services
from checkpoints.stages import InProcessStages
from triton_diffusion.errors import DiffusionError, WorkerGroupError
from triton_diffusion.state import RequestState

FOREVER = 100_000


@pytest.fixture(scope="module")
def reference(flux_checkpoint: Path) -> Reference:
    return Reference(flux_checkpoint)


@pytest.fixture(scope="module")
def in_process(flux_checkpoint: Path) -> InProcessStages:
    return InProcessStages(flux_checkpoint)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max().item()
    print(f"largest error {error:.2e}")
    assert error < 1e-4


# One replica of two ranks.


@pytest.fixture(scope="module")
def two_ranks(flux_checkpoint: Path) -> Iterator[dict[str, Caller]]:
    with run_services(flux_checkpoint, num_gpus=2, dp_size=1) as callers:
        yield callers


def test_two_ranks_draw_the_pipelines_picture(two_ranks: dict[str, Caller], reference: Reference) -> None:
    assert [len(caller.pids()) for caller in two_ranks.values()] == [2, 2, 2]
    request = make_request(num_outputs=2, guidance_scale=2.0, negative_prompt="dark")
    blob = make_blob("r", request)
    for stage_model in ("text_encoding", "denoising"):
        blob = two_ranks[stage_model].run(blob)
    assert_close(load(blob)["latents"], reference.latents(request))
    pictures = load(two_ranks["decoding"].run(blob))["pictures"].int()
    assert (pictures - torch.from_numpy(reference.pictures(request)).int()).abs().max() <= 1


def test_a_request_that_fails_on_two_ranks_fails_alone(
    two_ranks: dict[str, Caller], in_process: InProcessStages, reference: Reference
) -> None:
    denoising, request = two_ranks["denoising"], make_request(num_inference_steps=12)
    tensors = {"prompt_embeds": torch.zeros(1, 24, 33), "pooled_prompt_embeds": torch.zeros(1, 32)}
    bad = denoising.send(save(tensors, RequestState("bad", request).metadata()))
    good = denoising.send(in_process.encode("good", request))
    error = error_of(bad)
    assert isinstance(error, DiffusionError)
    assert str(error).startswith("rank 0: ")
    assert_close(load(result_of(good))["latents"], reference.latents(request))


def test_two_ranks_stay_in_step_through_a_cancel(
    two_ranks: dict[str, Caller], in_process: InProcessStages, reference: Reference
) -> None:
    denoising, request = two_ranks["denoising"], make_request(num_inference_steps=40, seed=2)
    kept = denoising.send(in_process.encode("kept", request))
    gone = denoising.send(in_process.encode("gone", make_request(num_inference_steps=FOREVER)))
    denoising.progress("gone", 5)
    denoising.cancel("gone")
    error_of(gone)
    assert_close(load(result_of(kept))["latents"], reference.latents(request))


def test_requests_in_flight_are_replayed_when_a_rank_is_killed(
    two_ranks: dict[str, Caller], in_process: InProcessStages, reference: Reference
) -> None:
    denoising = two_ranks["denoising"]
    requests = {
        f"replayed-{seed}": make_request(num_inference_steps=300, seed=seed, guidance_scale=2.0) for seed in (1, 2)
    }
    waiting = make_request(height=64, num_inference_steps=2)
    blobs = {request_id: in_process.encode(request_id, request) for request_id, request in requests.items()}
    futures = {request_id: denoising.send(blob) for request_id, blob in blobs.items()}
    futures["waiting"] = denoising.send(in_process.encode("waiting", waiting))
    denoising.progress("replayed-2", 10)
    before = denoising.pids()
    os.kill(before[1], signal.SIGKILL)
    for request_id, request in {**requests, "waiting": waiting}.items():
        assert_close(load(result_of(futures[request_id]))["latents"], reference.latents(request))
    assert set(denoising.pids()).isdisjoint(before), "the whole group is replaced"
    assert not any(psutil.pid_exists(pid) for pid in before)


# Two replicas of a rank.


@pytest.fixture(scope="module")
def two_replicas(flux_checkpoint: Path) -> Iterator[Caller]:
    with run_service("denoising", flux_checkpoint, num_gpus=2, dp_size=2) as caller:
        yield caller


def test_two_replicas_share_the_requests(
    two_replicas: Caller, in_process: InProcessStages, reference: Reference
) -> None:
    assert [len(two_replicas.pids(index)) for index in range(2)] == [1, 1]
    requests = {f"shared-{seed}": make_request(num_inference_steps=15, seed=seed) for seed in range(4)}
    blobs = {request_id: in_process.encode(request_id, request) for request_id, request in requests.items()}
    futures = {request_id: two_replicas.send(blob) for request_id, blob in blobs.items()}
    for request_id, request in requests.items():
        assert_close(load(result_of(futures[request_id]))["latents"], reference.latents(request))


def test_both_replicas_run_at_the_same_time(two_replicas: Caller, in_process: InProcessStages) -> None:
    """With different sizes they cannot share a batch, so one replica would do them one after the other."""
    sizes = {"one": 32, "other": 64}
    futures = {
        request_id: two_replicas.send(
            in_process.encode(request_id, make_request(height=height, num_inference_steps=FOREVER))
        )
        for request_id, height in sizes.items()
    }
    for request_id in sizes:
        assert two_replicas.progress(request_id, 3)[0].step > 3
    for request_id in sizes:
        two_replicas.cancel(request_id)
        error_of(futures[request_id])


def test_the_other_replica_goes_on_when_one_dies_and_a_request_that_dies_with_it_twice_is_given_up(
    two_replicas: Caller, in_process: InProcessStages, reference: Reference
) -> None:
    blobs = [in_process.encode(name, make_request(num_inference_steps=FOREVER)) for name in ("culprit", "bystander")]
    culprit, bystander = (two_replicas.send(blob) for blob in blobs)
    two_replicas.progress("bystander", 1)
    for _ in range(2):
        two_replicas.progress("culprit", 3)
        # After the first death it goes to the replica that is up.
        replica = two_replicas.service._scheduler.entry("culprit").replica
        (pid,) = two_replicas.pids(replica)
        os.kill(pid, signal.SIGKILL)
        # Until the death has been seen, progress is that of the dead.
        wait_until(lambda replica=replica, pid=pid: pid not in two_replicas.pids(replica))
    error = error_of(culprit)
    assert isinstance(error, WorkerGroupError)
    assert "was killed by signal 9" in str(error)
    assert not bystander.done()
    two_replicas.cancel("bystander")
    error_of(bystander)
    request = make_request(seed=6)
    assert_close(load(two_replicas.run(in_process.encode("after", request)))["latents"], reference.latents(request))


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
