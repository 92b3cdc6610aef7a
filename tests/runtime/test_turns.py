"""Stages on the same cores compute one after the other."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from triton_diffusion.runtime.turns import Turns


def test_only_one_has_the_turn_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        turns = Turns(str(tmp_path))
        for _ in range(20):
            with turns.take():
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_who_waits_comes_before_one_that_goes_on_without_a_pause(tmp_path: Path) -> None:
    """With a plain lock, the stage that denoises would have it back before another one is awake."""
    order: list[str] = []
    stop = threading.Event()

    def denoise() -> None:
        turns = Turns(str(tmp_path))
        while not stop.is_set():
            with turns.take():
                order.append("denoise")
                time.sleep(0.01)

    thread = threading.Thread(target=denoise)
    thread.start()
    turns = Turns(str(tmp_path))
    waited = []
    for _ in range(10):
        time.sleep(0.005)
        before = len(order)
        with turns.take():
            waited.append(len(order) - before)
    stop.set()
    thread.join()
    assert max(waited) <= 2, "the tick that runs, and at most the one that was before us at the door"


def test_a_turn_ends_with_an_exception(tmp_path: Path) -> None:
    turns, other = Turns(str(tmp_path)), Turns(str(tmp_path))
    try:
        with turns.take():
            raise RuntimeError
    except RuntimeError:
        pass
    with other.take():
        pass


def test_nothing_is_written_and_without_a_folder_nobody_waits(tmp_path: Path) -> None:
    with Turns(str(tmp_path)).take():
        assert not list(tmp_path.iterdir())
    with Turns("").take(), Turns("").take():
        pass
