"""The short forms of scripts/benchmark faults and soak, on one server of their own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.end_to_end.conftest import RunningServer, own_server

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.faults.command import SETTINGS
from benchmarks.faults.examiner import Examiner, draw_references
from benchmarks.faults.ranks import Injector, find_ranks
from benchmarks.faults.trial import Trial, different_requests, disturbed_trial
from benchmarks.soak.growth import growths
from benchmarks.soak.trial import soak
from benchmarks.variables import environment
from triton_diffusion_client import AsyncDiffusionClient

pytestmark = pytest.mark.end_to_end

_QUICK = {"warmup_resolutions": "none", "max_batch_tokens": "1000"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def temporary_files(folder: Path) -> Path:
    files = folder / "t"
    files.mkdir()
    return files


@pytest.fixture(scope="module")
def replicated(folder: Path, temporary_files: Path) -> Iterator[RunningServer]:
    with environment({"TMPDIR": str(temporary_files)}), own_server(folder, SETTINGS | _QUICK) as running:
        yield running


def test_no_request_is_lost_and_no_picture_wrong_while_ranks_are_killed_and_stopped(
    replicated: RunningServer, folder: Path
) -> None:
    requests = different_requests(6, max_sequence_length=32)

    async def run() -> Trial:
        async with AsyncDiffusionClient(replicated.grpc_url, retries=0) as client:
            examiner = Examiner(client, await draw_references(client, requests))
            return await disturbed_trial(
                examiner,
                requests,
                Injector(replicated.process.pid, seed=1),
                clients=8,
                duration_s=30,
                every_s=7,
                log_path=folder / "server.log",
            )

    trial = asyncio.run(run())
    assert {fault.kind for fault in trial.faults} == {"kill", "stop"}
    assert trial.examiner.losses == []
    assert trial.examiner.num_wrong == 0
    assert trial.examiner.num_answered > 8
    assert None not in trial.recoveries_s


def test_nothing_grows_under_a_mixed_load_with_cancels_and_a_fault(
    replicated: RunningServer, temporary_files: Path
) -> None:
    """Memory is for the long form: in half a minute it is still taken for sizes that come for the first time."""
    num_ranks = len(find_ranks(replicated.process.pid))
    seen = asyncio.run(
        soak(
            replicated.process,
            temporary_files,
            clients=6,
            duration_s=25,
            fault_every_s=14,
            look_every_s=1,
            seed=0,
            max_sequence_length=32,
        )
    )
    assert seen.caller.errors == {}
    assert seen.caller.num_answered > 0
    assert seen.num_cancelled > 0
    grown = {(each.name, each.measure): each for each in growths(seen.snapshots)}
    descriptors = [each for each in grown.values() if each.measure == "file descriptors"]
    assert len(descriptors) > num_ranks
    assert not [each for each in descriptors if each.percent > each.allowed_percent(50)]
    for measure in ("files in /dev/shm", "temporary files"):
        assert grown["server", measure].percent <= grown["server", measure].allowed_percent(25)
    processes = psutil.Process(replicated.process.pid).children(recursive=True)
    assert not [each for each in processes if each.status() == psutil.STATUS_ZOMBIE]
