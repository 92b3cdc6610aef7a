"""max_batch_tokens: measured once, kept in a file, and what is run before a stage is ready."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from checkpoints.services import run_service
from checkpoints.stages import alone
from triton_diffusion.errors import DiffusionError
from triton_diffusion.families.flux import FAMILY
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.loading.components import Components, load_components
from triton_diffusion.runtime import calibration
from triton_diffusion.runtime.calibration import (
    Calibration,
    WarmUp,
    _OtherWork,
    alone_on_this_machine,
    cache_path,
    read_calibration,
    uncalibrated,
    write_calibration,
)
from triton_diffusion.runtime.messages import RunTick, TickDone
from triton_diffusion.runtime.rank_executor import RankExecutor
from triton_diffusion.stages.plan import make_plan

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def components_of(folder: Path, stage_model: str, dtype: torch.dtype = torch.float32) -> Components:
    checkpoint = open_checkpoint(str(folder))
    return load_components(checkpoint, FAMILY.stage_components(checkpoint)[stage_model], dtype=dtype, device=CPU)


class TimedExecutor(RankExecutor):
    """The real stage, with a clock that says what a device would take; more than `memory` rows do not fit."""

    def __init__(
        self,
        components: Components,
        seconds: dict[int, float],
        memory: int = 10**6,
        num_threads: int = 1,
        seconds_on: dict[tuple[int, int], float] | None = None,
    ) -> None:
        """Args:
        seconds: of a tick by number of rows.
        seconds_on: the same by (rows, threads), where it is not as above.
        """
        plan = make_plan("denoising", FAMILY, components, alone())
        super().__init__(plan, alone(), tokens_per_row=lambda _: TOKENS)
        self._seconds = seconds
        self._seconds_on = seconds_on or {}
        self._memory = memory
        self.num_threads = num_threads
        self.runs: set[tuple[int, int]] = set()
        """(rows, threads) of the ticks that were run."""

    def run(self, tick: RunTick, num_threads: int | None = None) -> TickDone:
        done = super().run(tick, num_threads)
        values: dict[str, Any] = {name: getattr(done, name) for name in done.__struct_fields__}
        rows, threads = len(tick.rows), torch.get_num_threads()
        self.runs.add((rows, threads))
        values["duration_s"] = self._seconds_on.get((rows, threads), self._seconds.get(rows, rows))
        if len(tick.rows) > self._memory:
            values["failed"] = {tick.rows[0][0]: ("StageError", "out of memory")}
        return TickDone(**values)


def calibrate(folder: Path, seconds: dict[int, float], **values: Any) -> Calibration:
    components = components_of(folder, "denoising")
    executor = TimedExecutor(components, seconds, **values)
    calibration = WarmUp("denoising", executor, FAMILY, components, alone()).calibrate("a device")
    assert not executor._held, "the warm-up leaves no request behind"
    return calibration


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """Of this process, whose executors use as many as they are told."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


TOKENS = 48 + 8 * 8
"""Of a row of the tiny checkpoint's default request: 48 text tokens, 32 x 32 pixels in tokens of 4 x 4."""


def test_the_limit_is_where_a_larger_batch_gains_no_speed(flux_checkpoint: Path) -> None:
    calibration = calibrate(flux_checkpoint, {1: 1.0, 2: 1.1, 4: 1.5, 8: 3.0, 16: 6.0})
    assert calibration.max_batch_tokens == 4 * TOKENS
    assert [tokens // TOKENS for tokens, _ in calibration.measurements] == [1, 2, 4, 8, 16]


def test_one_slow_measurement_does_not_end_the_search(flux_checkpoint: Path) -> None:
    assert calibrate(flux_checkpoint, {1: 1.0, 2: 2.1, 4: 2.2, 8: 4.4, 16: 8.8}).max_batch_tokens == 4 * TOKENS


def test_a_device_that_gains_nothing_from_batches_runs_rows_alone(flux_checkpoint: Path) -> None:
    assert calibrate(flux_checkpoint, {1: 1.0, 2: 2.0, 4: 4.0}).max_batch_tokens == TOKENS


def test_what_does_not_fit_into_memory_is_above_the_limit(flux_checkpoint: Path) -> None:
    calibration = calibrate(flux_checkpoint, {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, memory=4)
    assert calibration.max_batch_tokens == 4 * TOKENS


def test_a_single_row_that_fails_is_an_error(flux_checkpoint: Path) -> None:
    with pytest.raises(DiffusionError, match="out of memory"):
        calibrate(flux_checkpoint, {}, memory=0)


# Threads.


def test_a_small_batch_runs_on_as_many_threads_as_it_keeps_busy(flux_checkpoint: Path) -> None:
    on = {(1, 4): 1.0, (1, 2): 0.9, (1, 1): 1.01, (2, 4): 1.0, (2, 2): 1.02, (2, 1): 1.2, (4, 4): 1.0, (4, 2): 1.1}
    calibration = calibrate(flux_checkpoint, {}, num_threads=4, seconds_on=on)
    assert calibration.threads_by_tokens == [(TOKENS, 1), (2 * TOKENS, 2)]
    assert calibration.measurements[:3] == [(TOKENS, 1.01), (2 * TOKENS, 1.02), (4 * TOKENS, 1.0)]


def test_fewer_threads_are_not_tried_any_more_where_a_smaller_batch_needs_all(flux_checkpoint: Path) -> None:
    components = components_of(flux_checkpoint, "denoising")
    executor = TimedExecutor(components, {}, num_threads=2, seconds_on={(1, 2): 1.0, (1, 1): 1.03})
    calibration = WarmUp("denoising", executor, FAMILY, components, alone()).calibrate("a device")
    assert calibration.threads_by_tokens == []
    assert {run for run in executor.runs if run[1] == 1} == {(1, 1)}


def test_a_tick_has_the_threads_of_its_tokens(flux_checkpoint: Path) -> None:
    components = components_of(flux_checkpoint, "denoising")
    executor = TimedExecutor(components, {}, num_threads=3)
    executor.limit_threads([(TOKENS, 1), (2 * TOKENS, 2)])
    WarmUp("denoising", executor, FAMILY, components, alone()).warm_up(None, 4 * TOKENS)
    assert executor.runs == {(1, 1), (4, 3)}


def test_a_tick_has_no_more_threads_than_it_is_allowed(flux_checkpoint: Path) -> None:
    executor = TimedExecutor(components_of(flux_checkpoint, "denoising"), {}, num_threads=3)
    executor.limit_threads([(0, 1)])
    for allowed in (2, None):
        executor.run(RunTick(tick_id=1, rows=[], num_steps=1), allowed)
        assert torch.get_num_threads() == 1
    executor.limit_threads([])
    for allowed, expected in ((2, 2), (None, 3)):
        executor.run(RunTick(tick_id=1, rows=[], num_steps=1), allowed)
        assert torch.get_num_threads() == expected


# The file.


def test_a_calibration_is_kept_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    calibration = Calibration(device="d", max_batch_tokens=5, measurements=[(1, 0.5)], threads_by_tokens=[(1, 2)])
    assert read_calibration(path) is None
    write_calibration(path, calibration)
    assert read_calibration(path) == calibration
    assert os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"device": 1}', "null"])
def test_a_file_that_is_none_is_measured_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "file.json").write_text(content)
    assert read_calibration(tmp_path / "file.json") is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_calibration(tmp_path / "file" / "x.json", uncalibrated("d", 5))


def test_another_dtype_number_of_threads_or_layout_is_another_file(flux_checkpoint: Path, cache: Path) -> None:
    paths = {
        cache_path("decoding", components_of(flux_checkpoint, "decoding", dtype), num_threads=threads, layout=layout)
        for dtype in (torch.float32, torch.bfloat16)
        for threads in (1, 2)
        for layout in ("one", "u2")
    }
    assert len(paths) == 8
    assert {path.parent for path in paths} == {cache / "calibration"}


# When it is measured.


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How many cores others use at each look; the last one stays."""
    looks = [0.0]
    monkeypatch.setattr(_OtherWork, "num_cores", lambda _: looks.pop(0) if looks[1:] else looks[0])
    return looks


def test_it_is_measured_when_the_other_stages_have_loaded(cache: Path, busy: list[float]) -> None:
    busy[:] = [1.8, 1.6, 0.35, 0.1]
    with alone_on_this_machine(cache / "file.json"):
        assert busy == [0.1]


def test_cores_that_are_never_quiet_are_not_waited_for_for_ever(
    cache: Path, busy: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy[:] = [1.8]
    monkeypatch.setattr(calibration, "_QUIET_TIMEOUT_S", 0.1)
    with alone_on_this_machine(cache / "file.json"):
        assert busy == [1.8]


def test_a_folder_that_cannot_be_made_keeps_nobody_from_measuring(tmp_path: Path, busy: list[float]) -> None:
    (tmp_path / "file").write_text("")
    busy[:] = [1.8, 0.1]
    with alone_on_this_machine(tmp_path / "file" / "x.json"):
        assert busy == [0.1]


def test_work_of_others_is_told_from_our_own() -> None:
    watches = [_OtherWork(num_ranks) for num_ranks in (0, 1)]
    give_up_s = time.monotonic() + 0.5
    while time.monotonic() < give_up_s:
        pass
    all_work, other_work = (watch.num_cores() for watch in watches)
    assert 0 <= other_work < all_work


def test_a_process_that_keeps_a_core_busy_shows() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            watch = _OtherWork(num_ranks=1)
            time.sleep(1.0)
            num_cores = watch.num_cores()
        finally:
            process.kill()
    assert num_cores > 0.5


# In a stage that starts.


def test_a_stage_measures_at_its_first_start_only(
    flux_checkpoint: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with run_service("denoising", flux_checkpoint) as caller:
        measured = caller.service.metrics().max_batch_tokens
    (file,) = (cache / "calibration").glob("denoising-*.json")
    kept = read_calibration(file)
    assert kept is not None
    assert kept.max_batch_tokens == measured
    # It ran out of memory, too, since it was measured.
    kept = msgspec.structs.replace(uncalibrated("d", 777), measurements=[(777, 0.5)], memory_limit=555)
    write_calibration(file, kept)
    with run_service("denoising", flux_checkpoint) as caller:
        assert caller.service.metrics().max_batch_tokens == 555
    assert read_calibration(file) == kept
    assert f"if there is more memory now, delete {file}" in capfd.readouterr().err


DISTURBED = Calibration(
    device="d",
    max_batch_tokens=777,
    measurements=[(777, 0.5)],
    threads_by_tokens=[],
    memory_limit=555,
    others_cores=1.2,
)
"""Threads that had no core of their own were of no use, and would not be used on a quiet machine either."""


def test_what_was_measured_beside_other_work_does_for_the_same_start(tmp_path: Path) -> None:
    """A rank that takes another's place would measure beside all that the server does."""
    path = tmp_path / "file.json"
    before_s = time.time() - 1
    write_calibration(path, DISTURBED)
    assert read_calibration(path, since_s=before_s) == DISTURBED
    assert read_calibration(path, since_s=before_s + 60) == uncalibrated("d", memory_limit=555)


def test_what_was_measured_on_a_quiet_machine_does_for_every_start(tmp_path: Path) -> None:
    quiet = msgspec.structs.replace(DISTURBED, others_cores=0.1)
    write_calibration(tmp_path / "file.json", quiet)
    assert read_calibration(tmp_path / "file.json", since_s=time.time() + 60) == quiet


def test_a_later_start_measures_again_what_other_work_has_disturbed(
    flux_checkpoint: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with run_service("decoding", flux_checkpoint):
        (file,) = (cache / "calibration").glob("decoding-*.json")
    write_calibration(file, DISTURBED)
    os.utime(file, (0, 0))
    with run_service("decoding", flux_checkpoint) as caller:
        assert caller.service.metrics().max_batch_tokens <= 555
    kept = read_calibration(file)
    assert kept is not None
    assert kept.max_batch_tokens not in (0, 777)
    assert kept.memory_limit == 555
    assert capfd.readouterr().err.count("measured in") == 2


def test_what_is_configured_is_not_measured(flux_checkpoint: Path, cache: Path) -> None:
    with run_service("decoding", flux_checkpoint, max_batch_tokens=123) as caller:
        assert caller.service.metrics().max_batch_tokens == 123
    assert not list(cache.glob("**/*.json"))


def test_ranks_of_a_group_agree_on_what_was_measured(flux_checkpoint: Path, cache: Path) -> None:
    with run_service("decoding", flux_checkpoint, num_gpus=2, dp_size=1) as caller:
        assert caller.service.metrics().max_batch_tokens > 0
    assert len(list((cache / "calibration").glob("decoding-*.json"))) == 1


def test_of_replicas_that_start_together_one_measures(
    flux_checkpoint: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with run_service("decoding", flux_checkpoint, num_gpus=2, dp_size=2) as caller:
        (file,) = (cache / "calibration").glob("decoding-*.json")
        kept = read_calibration(file)
        assert kept is not None
        assert kept.max_batch_tokens == caller.service.metrics().max_batch_tokens
    assert capfd.readouterr().err.count("measured in") == 1


def test_a_warm_up_size_that_the_model_does_not_have_stops_the_start(flux_checkpoint: Path) -> None:
    with (
        pytest.raises(DiffusionError, match=r"warmup_resolutions: 64x33 must be multiples of 4"),
        run_service("denoising", flux_checkpoint, warmup_resolutions="64x64,64x33", max_batch_tokens=500),
    ):
        pass
