"""Worker groups on the same cores take turns, and none waits for ever."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from triton_diffusion.runtime.turns import Turns

_HOLD = """
import sys
from pathlib import Path
from triton_diffusion.runtime.turns import Turns
with Turns(Path(sys.argv[1]), [0, 1]).take():
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(folder: Path) -> subprocess.Popen[str]:
    """A process that has cores 0 and 1."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_turn_waits_for_the_one_before(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        turns = Turns(tmp_path, [1], patience_s=60)
        ended = threading.Timer(0.1, process.kill)
        ended.start()
        with turns.take() as alone:
            assert alone
            assert ended.finished.is_set()


def test_other_cores_do_not_wait(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        with Turns(tmp_path, [2, 3], patience_s=0).take() as alone:
            assert alone
        process.communicate("")


def test_a_process_that_is_stopped_delays_the_others_but_once(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        with Turns(tmp_path, [0, 1], patience_s=0.05).take() as alone:
            assert not alone
        process.kill()


def test_while_a_process_is_stopped_only_the_first_turn_waits(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        turns = Turns(tmp_path, [0, 1], patience_s=0.2)
        for _ in range(3):
            with turns.take() as alone:
                assert not alone
        assert sum(thread.name == "turns" for thread in threading.enumerate()) == 1
        process.kill()
        process.wait()
    for thread in threading.enumerate():
        if thread.name == "turns":
            thread.join()
    with turns.take() as alone:
        assert alone


def test_a_process_that_dies_gives_its_cores_back(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        process.kill()
    with Turns(tmp_path, [0, 1], patience_s=0).take() as alone:
        assert alone


def test_nobody_has_a_second_turn_while_another_waits(tmp_path: Path) -> None:
    order: list[str] = []
    first, second = Turns(tmp_path, [0], patience_s=60), Turns(tmp_path, [0], patience_s=60)

    def run(name: str, turns: Turns) -> None:
        for _ in range(20):
            with turns.take():
                order.append(name)
                # Long enough for the other one to come into the queue.
                threading.Event().wait(0.005)

    threads = [threading.Thread(target=run, args=pair) for pair in (("a", first), ("b", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = "".join(order)[: 2 * 18]
    assert "aaa" not in both
    assert "bbb" not in both


def test_cores_are_free_while_nobody_has_them_or_waits_for_them(tmp_path: Path) -> None:
    turns = Turns(tmp_path, [0, 1])
    assert turns.are_free()
    with Turns(tmp_path, [1]).take():
        assert not turns.are_free()
        assert Turns(tmp_path, [0]).are_free()
    assert turns.are_free()


def test_idle_cores_are_taken_without_waiting_for_others(tmp_path: Path) -> None:
    turns = Turns(tmp_path, [0, 1, 2])
    with turns.take_idle() as num_cores:
        assert num_cores == 3
        assert not Turns(tmp_path, [2]).are_free()
    with Turns(tmp_path, [1]).take(), turns.take_idle() as num_cores:
        assert num_cores == 2
    assert turns.are_free()


def test_a_core_that_another_waits_for_is_not_idle(tmp_path: Path) -> None:
    # As one that waits for the core: it holds the queue.
    with (tmp_path / "core-0.queue").open("w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        with Turns(tmp_path, [0]).take_idle() as num_cores:
            assert num_cores == 0


def test_only_turns_that_count_are_counted_and_by_all_processes(tmp_path: Path) -> None:
    counted, other = Turns(tmp_path, [0, 1], counted=True), Turns(tmp_path, [0])
    assert other.num_taken() == 0
    for turns in (counted, other, counted):
        with turns.take():
            pass
    with _holder(tmp_path) as process:
        process.communicate("")
    assert other.num_taken() == 2
