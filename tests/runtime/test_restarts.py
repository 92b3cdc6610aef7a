"""When a worker group is started again, by a clock of the test's own."""

from __future__ import annotations

from checkpoints.timing import Clock
from triton_diffusion.config import StageConfig
from triton_diffusion.runtime.restarts import Restarts


def make_restarts(clock: Clock) -> Restarts:
    return Restarts(StageConfig(crash_loop_restarts=3, crash_loop_window_s=60), clock)


def test_a_group_that_has_worked_is_started_again_at_once() -> None:
    restarts = make_restarts(Clock())
    for _ in range(10):
        restarts.ready()
        restarts.progressed()
        assert restarts.died() == 0
    assert not restarts.is_crash_loop


def test_the_pauses_grow_up_to_a_minute() -> None:
    restarts = make_restarts(Clock())
    assert [restarts.died() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_deaths_in_a_row_are_a_crash_loop_until_a_batch_is_finished() -> None:
    restarts = make_restarts(Clock())
    for expected in (False, False, True):
        restarts.ready()
        restarts.died()
        assert restarts.is_crash_loop == expected
    restarts.ready()
    assert restarts.is_crash_loop
    restarts.progressed()
    assert not restarts.is_crash_loop
    assert restarts.died() == 0


def test_a_group_that_had_nothing_to_do_for_long_is_in_no_crash_loop() -> None:
    clock = Clock()
    restarts = make_restarts(clock)
    for _ in range(5):
        restarts.ready()
        clock.now_s += 61
        assert restarts.died() == 0


def test_starts_that_take_long_and_fail_are_a_crash_loop() -> None:
    clock = Clock()
    restarts = make_restarts(clock)
    for _ in range(3):
        clock.now_s += 1000
        restarts.died()
    assert restarts.is_crash_loop


def test_the_count_begins_anew_when_the_cause_is_gone() -> None:
    restarts = make_restarts(Clock())
    for _ in range(3):
        restarts.died()
    restarts.cause_removed()
    assert not restarts.is_crash_loop
    assert restarts.died() == 1
