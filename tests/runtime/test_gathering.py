"""How long a request waits for others to share its tick."""

from __future__ import annotations

from pathlib import Path

from triton_diffusion.runtime.gathering import Gathering
from triton_diffusion.runtime.turns import Turns


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_on_free_cores_nothing_waits(tmp_path: Path) -> None:
    gathering = Gathering(Turns(tmp_path, [0]))
    assert not gathering.shall_wait(gains=True)
    assert gathering.poll_s is None


def test_without_turns_nothing_waits() -> None:
    assert not Gathering(None).shall_wait(gains=True)


def test_while_others_have_the_cores_it_waits_for_two_of_their_steps(tmp_path: Path) -> None:
    steps = Turns(tmp_path, [0], counted=True)
    gathering = Gathering(Turns(tmp_path, [0]))
    for waits in (True, True, False, True):
        with steps.take():
            assert gathering.shall_wait(gains=True) is waits
            assert (gathering.poll_s is not None) is waits


def test_turns_that_are_no_steps_do_not_count(tmp_path: Path) -> None:
    others = Turns(tmp_path, [0])
    gathering = Gathering(Turns(tmp_path, [0]))
    for _ in range(5):
        with others.take():
            assert gathering.shall_wait(gains=True)


def test_it_goes_on_as_soon_as_the_cores_are_free_or_the_batch_gains_no_more(tmp_path: Path) -> None:
    gathering = Gathering(Turns(tmp_path, [0]))
    with Turns(tmp_path, [0]).take():
        assert gathering.shall_wait(gains=True)
        assert not gathering.shall_wait(gains=False)
        assert gathering.shall_wait(gains=True)
    assert not gathering.shall_wait(gains=True)


def test_for_a_process_that_never_ends_its_turn_it_waits_a_second(tmp_path: Path) -> None:
    clock = Clock()
    gathering = Gathering(Turns(tmp_path, [0]), clock)
    with Turns(tmp_path, [0]).take():
        assert gathering.shall_wait(gains=True)
        clock.now_s = 0.9
        assert gathering.shall_wait(gains=True)
        clock.now_s = 1.0
        assert not gathering.shall_wait(gains=True)
