"""Worker groups of several ranks, several replicas, and what happens when their processes die."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load, save

from checkpoints.reference import Reference
from checkpoints.requests import make_blob, make_request
from checkpoints.services import Caller, error_of, result_of, run_service, run_services
from checkpoints.stages import InProcessStages
from checkpoints.timing import wait_until
from triton_diffusion.errors import DiffusionError
from triton_diffusion.runtime.messages import TickDone
from triton_diffusion.state import RequestState

FOREVER = 100_000


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


def test_nobody_else_reaches_the_socket_and_the_file_at_which_ranks_meet(
    two_ranks: dict[str, Caller], run_dirs: Path
) -> None:
    folders = list(run_dirs.glob("triton-diffusion-*"))
    assert len(folders) == len(two_ranks)
    for folder in folders:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert sorted(path.name for path in folder.iterdir()) == ["ranks", "store"]
        assert stat.S_IMODE((folder / "ranks").stat().st_mode) == 0o600


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
    assert denoising.service._scheduler.entry("replayed-2").kept[0] >= 5, "it goes on from a checkpoint"
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


def test_a_request_goes_on_from_its_last_checkpoint_at_the_replica_that_is_up(
    two_replicas: Caller, in_process: InProcessStages, reference: Reference
) -> None:
    request = make_request(num_inference_steps=400, seed=6)
    future = two_replicas.send(in_process.encode("wanderer", request))
    for restarts in range(2):
        reached = two_replicas.progress("wanderer", 50 * restarts + 20, restarts)[0].step
        replica = two_replicas.service._scheduler.entry("wanderer").replica
        os.kill(two_replicas.pids(replica)[0], signal.SIGKILL)
        progress = two_replicas.progress("wanderer", FOREVER, restarts)[0]
        assert progress.restarts == restarts + 1, "who watches is told at once"
        assert progress.step >= reached - 10
    assert_close(load(result_of(future))["latents"], reference.latents(request))


def test_a_request_whose_checkpoint_cannot_be_used_begins_anew(
    two_replicas: Caller, in_process: InProcessStages, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = two_replicas.service
    keep = service._keep_checkpoints

    def keep_broken(done: TickDone) -> None:
        keep(done)
        for request in service._book.requests.values():
            request.checkpoint = request.checkpoint and b"broken"

    monkeypatch.setattr(service, "_keep_checkpoints", keep_broken)
    request = make_request(num_inference_steps=200, seed=8)
    future = two_replicas.send(in_process.encode("forgetful", request))
    two_replicas.progress("forgetful", 20)
    os.kill(two_replicas.pids(service._scheduler.entry("forgetful").replica)[0], signal.SIGKILL)
    assert_close(load(result_of(future))["latents"], reference.latents(request))


def test_what_waits_goes_back_to_a_replica_that_is_up_again(two_replicas: Caller, in_process: InProcessStages) -> None:
    """Of another size, it would wait for ever behind the request that runs at the other replica."""
    wait_until(lambda: all(replica.ready for replica in two_replicas.service._replicas), timeout_s=30.0)
    sizes = {"one": 32, "other": 64, "another": 96, "last": 128}
    futures = {
        request_id: two_replicas.send(
            in_process.encode(request_id, make_request(height=height, num_inference_steps=FOREVER))
        )
        for request_id, height in sizes.items()
    }
    two_replicas.progress("one", 1)
    scheduler = two_replicas.service._scheduler
    os.kill(two_replicas.pids(0)[0], signal.SIGKILL)
    wait_until(lambda: not scheduler.requests_of(0), timeout_s=30.0)
    wait_until(lambda: bool(scheduler.requests_of(0)), timeout_s=30.0)
    for request_id, future in futures.items():
        two_replicas.cancel(request_id)
        error_of(future)
