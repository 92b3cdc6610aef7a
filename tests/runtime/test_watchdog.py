"""The watchdog by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from triton_diffusion.config import StageConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.runtime.watchdog import Watchdog
from triton_diffusion.scheduler import Tick


class Bench:
    """A watchdog and a clock; the service looks every half second."""

    def __init__(self, **values: float) -> None:
        self.now_s = 100.0
        config = StageConfig(**{"watchdog_floor_s": 10.0, "watchdog_ceiling_s": 100.0} | values)  # type: ignore[arg-type]
        self.watchdog = Watchdog(config, lambda: self.now_s)
        self.stopped: Sequence[int] = ()
        self._next_id = 0

    def send(self, key: str = "a", tokens: int = 64, num_steps: int = 1, expected_s: float = 0.0) -> int:
        self._next_id += 1
        self.watchdog.sent(Tick(self._next_id, 0, key, (("r", 0),), tokens, num_steps, ()), expected_s)
        return self._next_id

    def run(self, seconds: float, **values: object) -> None:
        """A tick that takes so long."""
        tick_id = self.send(**values)  # type: ignore[arg-type]
        assert self.wait(seconds) is None
        self.watchdog.done(tick_id, seconds)

    def wait(self, seconds: float) -> str | None:
        """What the watchdog says within so many seconds."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + 0.5)
            if (said := self.watchdog.look(lambda: self.stopped)) is not None:
                return said
        return None


def test_a_tick_of_a_known_kind_has_the_floor_at_least() -> None:
    bench = Bench()
    for _ in range(2):
        bench.run(0.1)
    bench.send()
    assert bench.wait(10) is None
    said = bench.wait(1)
    assert said is not None
    assert "which takes 0.1 s by running mean (allowed: 10.0 s)" in said


def test_slow_ticks_have_a_multiple_of_the_running_mean() -> None:
    bench = Bench()
    for _ in range(3):
        bench.run(4)
    bench.send()
    assert bench.wait(39) is None
    assert bench.wait(2) is not None


def test_the_first_tick_of_a_kind_has_the_ceiling() -> None:
    bench = Bench()
    bench.run(90)
    bench.run(90, tokens=128)
    bench.send(key="b")
    assert bench.wait(100) is None
    said = bench.wait(1)
    assert said is not None
    assert "the first of its kind" in said


def test_the_next_group_does_everything_for_the_first_time_again() -> None:
    bench = Bench()
    bench.run(0.1)
    bench.send()
    bench.watchdog.forget()
    assert len(bench.watchdog) == 0
    bench.run(90)


def test_a_tick_that_is_known_to_take_longer_than_the_ceiling_is_let_go_on() -> None:
    bench = Bench()
    bench.send(num_steps=50, expected_s=300)
    assert bench.wait(600) is None
    assert bench.wait(1) is not None


def test_ticks_are_timed_from_the_end_of_the_one_before() -> None:
    bench = Bench()
    bench.run(0.1)
    first = bench.send()
    bench.send()
    assert bench.wait(9) is None
    bench.watchdog.done(first, 9)
    assert bench.wait(9) is None


def test_a_rank_that_is_stopped_is_stuck_after_the_floor_whatever_the_tick() -> None:
    bench = Bench()
    bench.send(expected_s=40)
    assert bench.wait(50) is None
    bench.stopped = [1]
    assert bench.wait(9) is None
    said = bench.wait(2)
    assert said is not None
    assert "rank 1 was stopped by a signal" in said


def test_a_rank_that_was_stopped_for_a_moment_goes_on() -> None:
    bench = Bench()
    bench.send()
    for _ in range(8):
        bench.stopped = [0]
        assert bench.wait(5) is None
        bench.stopped = []
        assert bench.wait(5) is None


def test_time_in_which_the_service_did_not_run_does_not_count() -> None:
    """A container that was paused, a machine that stood still: the ranks stood still as well."""
    bench = Bench()
    bench.run(0.1)
    bench.send()
    assert bench.wait(5) is None
    bench.now_s += 3600
    assert bench.wait(1) is None


def test_nothing_is_wrong_while_nothing_is_out() -> None:
    bench = Bench()
    assert bench.wait(1000) is None
    assert bench.watchdog.poll_s is None


def test_a_ceiling_of_zero_switches_it_off() -> None:
    bench = Bench(watchdog_ceiling_s=0)
    bench.send()
    assert bench.wait(1000) is None
    assert bench.watchdog.poll_s is None


@pytest.mark.parametrize("name", ["watchdog_factor", "watchdog_floor_s", "crash_loop_restarts"])
def test_there_is_no_watchdog_without_time(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        StageConfig(**{name: 0})
