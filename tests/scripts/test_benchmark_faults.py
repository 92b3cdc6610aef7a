"""scripts/benchmark faults and soak: what is computed there, without a server."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.faults.command import figures
from benchmarks.faults.examiner import Examiner
from benchmarks.faults.ranks import Fault, Rank
from benchmarks.faults.recovery import GroupReady, read_ready_groups, recovery_times
from benchmarks.faults.trial import Trial, different_requests
from benchmarks.picture import PictureRequest
from benchmarks.report import Figure, Report
from benchmarks.serving.load import Sent
from benchmarks.soak.growth import growths
from benchmarks.soak.mixed import MixedRequest, mixed_plan
from benchmarks.soak.resources import Snapshot
from triton_diffusion_client import ServerError, ServerUnavailableError

REQUEST = PictureRequest(seed=1, height=128, width=128, num_inference_steps=8, max_sequence_length=32)


def make_fault(at_s: float, *, replica: int = 0, stage: str = "denoising", kind: str = "kill") -> Fault:
    return Fault(at_s=at_s, rank=Rank(stage, replica, 0), kind=kind)


# Recovery.


def test_a_fault_ends_when_its_own_group_is_ready_again() -> None:
    ready = [
        GroupReady(at_s=5.0, stage="denoising", replica=0),
        GroupReady(at_s=12.0, stage="denoising", replica=1),
        GroupReady(at_s=13.0, stage="decoding", replica=0),
        GroupReady(at_s=18.5, stage="denoising", replica=0),
        GroupReady(at_s=30.0, stage="denoising", replica=0),
    ]
    faults = [make_fault(10.0), make_fault(16.0), make_fault(20.0, replica=1)]
    assert recovery_times(faults, ready) == [8.5, 2.5, None]


def test_the_log_tells_when_a_group_is_ready() -> None:
    lines = [
        "I1125 11:11:55.375000 1 server.cc:1] something else",
        "2026-11-25 11:11:55,375 INFO denoising x.service: denoising: starting replica 1, pids [7, 8]",
        "2026-11-25 11:11:58,500 INFO denoising x.service: denoising: replica 1 is ready on cpu in float32 after 3.1 s",
    ]
    (ready,) = read_ready_groups("\n".join(lines))
    assert (ready.stage, ready.replica) == ("denoising", 1)
    assert ready.at_s % 60 == 58.5


# Callers.


class FakeClient:
    """Answers one request after the other with what it was given: an error, or the value of all pixels."""

    def __init__(self, *answers: Exception | int) -> None:
        self.answers = list(answers)

    async def generate(self, prompt: str, **options: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(outputs=[SimpleNamespace(data=b"png", array=np.full((2, 2, 3), answer, np.uint8))])


def examine(*answers: Exception | int) -> Examiner:
    examiner = Examiner(FakeClient(*answers), {REQUEST: np.full((2, 2, 3), 100, np.uint8)})  # type: ignore[arg-type]
    asyncio.run(examiner.ask(REQUEST))
    return examiner


@pytest.mark.parametrize(("pixel", "num_wrong"), [(99, 0), (100, 0), (101, 0), (102, 1), (0, 1)])
def test_a_picture_is_wrong_when_a_pixel_differs_by_more_than_batches_make_it(pixel: int, num_wrong: int) -> None:
    assert examine(pixel).num_wrong == num_wrong


def test_a_request_that_gets_its_picture_at_a_second_try_failed_but_is_not_lost() -> None:
    examiner = examine(ServerUnavailableError("try again"), 100)
    assert (examiner.num_answered, len(examiner.errors), examiner.losses) == (1, 1, [])


def test_a_request_with_another_error_is_lost() -> None:
    examiner = examine(ServerError("broken"))
    assert (examiner.num_answered, len(examiner.errors), len(examiner.losses)) == (0, 1, 1)


def test_a_report_fails_when_a_request_is_lost() -> None:
    def report(*answers: Exception | int) -> Report:
        sent = [Sent(request=REQUEST, sent_s=0.0, ended_s=2.0, cancelled=False)]
        quiet = Trial(examiner=examine(100), begin_s=0.0, duration_s=4.0, sent=sent)
        disturbed = Trial(
            examiner=examine(*answers),
            begin_s=0.0,
            duration_s=8.0,
            sent=sent,
            faults=[make_fault(1.0), make_fault(3.0, kind="stop")],
            recoveries_s=[2.0, 4.0],
        )
        return Report(machine="", figures=figures(quiet, disturbed), must_hold=True)

    good = report(100)
    values = {figure.name: figure.value for figure in good.figures}
    assert values["disturbed over undisturbed"] == 50
    assert values["from a fault until the group is ready, median"] == 3
    assert values["latency of requests under way at a fault, worst"] == 2
    assert not good.has_failed
    assert report(ServerError("broken")).has_failed
    assert report(102).has_failed


def test_goals_that_need_not_hold_fail_nothing() -> None:
    assert not Report(machine="", figures=[Figure(name="ratio", value=2, at_most=1)]).has_failed


def test_the_pictures_that_are_compared_differ_and_are_the_same_in_every_run() -> None:
    first, again = (different_requests(24, 32) for _ in range(2))
    assert first == again
    assert len({each.prompt for each in first}) > 20
    assert len({each.num_inference_steps for each in first}) > 10


# The soak.


def test_a_mix_has_everything_and_a_third_is_cancelled() -> None:
    plan = list(itertools.islice(mixed_plan(0, 32, lambda: True), 600))
    requests = [each.request for each in plan]
    assert all(isinstance(each, MixedRequest) for each in requests)
    mixed = [each for each in requests if isinstance(each, MixedRequest)]
    assert {each.protocol for each in mixed} == {"grpc", "http"}
    assert {each.streamed for each in mixed} == {True, False}
    assert {each.output_format for each in mixed} == {"png", "jpeg", "webp", "raw"}
    assert {each.priority for each in mixed} == set(range(10))
    assert not [each for each in mixed if (each.protocol, each.streamed, each.output_format) == ("http", True, "raw")]
    assert sum(each.cancel_after_s is not None for each in plan) / 600 == pytest.approx(1 / 3, abs=0.06)
    assert plan == list(itertools.islice(mixed_plan(0, 32, lambda: True), 600))


def snapshots(*sizes: int, name: str = "a stub", measure: str = "RSS") -> list[Snapshot]:
    return [Snapshot(at_s=float(index), values={(name, measure): size}) for index, size in enumerate(sizes)]


def test_growth_is_held_against_the_time_behind_the_warm_up() -> None:
    mib = 2**20
    warm_up, steady, end = [mib * size for size in (50, 60, 80)], [100 * mib] * 6, [103 * mib] * 3
    (growth,) = growths(snapshots(*warm_up, *steady, *end))
    assert growth.percent == pytest.approx(3)
    assert growth.figure().holds is False


def test_one_odd_look_is_no_growth() -> None:
    (growth,) = growths(snapshots(*[2**28] * 19, 2**29))
    assert growth.percent == 0


def test_a_small_process_may_take_another_megabyte_and_a_process_another_descriptor() -> None:
    mib = 2**20
    (memory,) = growths(snapshots(*[20 * mib] * 15, *[int(20.9 * mib)] * 5))
    (descriptors,) = growths(snapshots(*[30] * 15, *[32] * 5, measure="file descriptors"))
    assert memory.percent > 2
    assert memory.figure().holds
    assert descriptors.figure().holds
    (leaking,) = growths(snapshots(*[30] * 15, *[40] * 5, measure="file descriptors"))
    assert not leaking.figure().holds


def test_what_is_no_longer_there_does_not_count() -> None:
    begin = snapshots(*[5] * 15, measure="threads", name="gone")
    end = [Snapshot(at_s=15.0 + index, values={}) for index in range(5)]
    assert growths([*begin, *end]) == []
