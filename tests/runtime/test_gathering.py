"""How long a request waits for others to share its tick."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoints.requests import make_blob, make_request
from checkpoints.services import result_of, run_service
from triton_diffusion import run_folder
from triton_diffusion.config import StageConfig
from triton_diffusion.runtime.gathering import Gathering
from triton_diffusion.runtime.rank_process import group_cores
from triton_diffusion.runtime.turns import Turns


def yes() -> bool:
    return True


def no() -> bool:
    return False


def test_on_free_cores_nothing_waits(tmp_path: Path) -> None:
    gathering = Gathering(Turns(tmp_path, [0]))
    assert not gathering.shall_wait(yes)
    assert gathering.poll_s is None


def test_without_turns_nothing_waits() -> None:
    assert not Gathering(None).shall_wait(yes)


def test_while_others_have_the_cores_it_waits_for_two_of_their_steps(tmp_path: Path) -> None:
    steps = Turns(tmp_path, [0], counted=True)
    gathering = Gathering(Turns(tmp_path, [0]))
    for waits in (True, True, False, True):
        with steps.take():
            assert gathering.shall_wait(yes) is waits
            assert (gathering.poll_s is not None) is waits


def test_turns_that_are_no_steps_do_not_count(tmp_path: Path) -> None:
    others = Turns(tmp_path, [0])
    gathering = Gathering(Turns(tmp_path, [0]))
    for _ in range(5):
        with others.take():
            assert gathering.shall_wait(yes)


def test_it_goes_on_as_soon_as_the_cores_are_free_or_the_batch_gains_no_more(tmp_path: Path) -> None:
    gathering = Gathering(Turns(tmp_path, [0]))
    with Turns(tmp_path, [0]).take():
        assert gathering.shall_wait(yes)
        assert not gathering.shall_wait(no)
        assert gathering.shall_wait(yes)
    assert not gathering.shall_wait(yes)


def test_for_a_process_that_never_ends_its_turn_it_waits_a_second(tmp_path: Path) -> None:
    gathering = Gathering(Turns(tmp_path, [0]), clock=iter([0.0, 0.9, 1.0]).__next__)
    with Turns(tmp_path, [0]).take():
        assert gathering.shall_wait(yes)
        assert gathering.shall_wait(yes)
        assert not gathering.shall_wait(yes)


def test_when_the_folder_of_the_turns_is_gone_nothing_waits(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    gathering = Gathering(Turns(folder, [0]))
    with Turns(folder, [0]).take():
        assert gathering.shall_wait(yes)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        assert not gathering.shall_wait(yes)


@pytest.mark.skipif(not group_cores(StageConfig(), 0), reason="with GPUs, stages do not take turns on the cores")
def test_requests_that_come_while_another_stage_has_the_cores_share_a_tick(
    flux_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(run_folder.VARIABLE, str(tmp_path))
    with run_service("text_encoding", flux_checkpoint, max_batch_tokens=10_000) as caller:
        caller.service._scheduler.cost_model.learn([(1, 1.0), (10_000, 1.0)])
        caller.run(make_blob("first", make_request()))
        before = caller.service.metrics()
        with Turns(tmp_path, sorted(os.sched_getaffinity(0))).take():
            waiting = [caller.send(make_blob(f"r{index}", make_request(prompt=str(index)))) for index in range(3)]
            # It is behind them in the service's inbox.
            caller.health()
        for future in waiting:
            result_of(future)
        after = caller.service.metrics()
    assert after.ticks_total - before.ticks_total == 1
    assert after.batch_rows_total - before.batch_rows_total == 3
