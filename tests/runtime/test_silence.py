"""A process is silent for as long as its watcher could have heard it and did not."""

from __future__ import annotations

from checkpoints.timing import Clock
from triton_diffusion.runtime.silence import Silence


def observe(silence: Silence, clock: Clock, beats: dict[int, int], after_s: float) -> dict[int, float]:
    clock.now_s += after_s
    return silence.observe(beats)


def test_seconds_without_a_sign_of_life_add_up_and_a_sign_ends_them() -> None:
    clock = Clock()
    silence = Silence(clock)
    assert observe(silence, clock, {1: 5, 2: 5}, 0.5) == {1: 0, 2: 0}
    assert observe(silence, clock, {1: 5, 2: 6}, 0.5) == {1: 0.5, 2: 0}
    assert observe(silence, clock, {1: 5, 2: 6}, 0.5) == {1: 1.0, 2: 0.5}
    assert observe(silence, clock, {1: 7, 2: 6}, 0.5) == {1: 0, 2: 1.0}


def test_a_time_in_which_the_watcher_itself_did_not_run_counts_for_little() -> None:
    clock = Clock()
    silence = Silence(clock)
    observe(silence, clock, {1: 5}, 0.5)
    assert observe(silence, clock, {1: 5}, 3600.0) == {1: 1.0}


def test_a_process_that_gives_no_more_signs_on_purpose_is_forgotten() -> None:
    clock = Clock()
    silence = Silence(clock)
    observe(silence, clock, {1: 5}, 0.5)
    observe(silence, clock, {1: 5}, 0.5)
    assert observe(silence, clock, {}, 0.5) == {}
    assert observe(silence, clock, {1: 5}, 0.5) == {1: 0}
