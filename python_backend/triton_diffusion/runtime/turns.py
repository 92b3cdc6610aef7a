"""Turns: the worker groups of several stages take turns on processor cores that they share.

Without a GPU the stages of a server have the same cores. A forward pass ends when its slowest thread does, so two at a
time, each with a thread on every core, take longer than one behind the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from triton_diffusion import run_folder

_COUNT_BYTES = 8


def open_turns(cores: Sequence[int], *, counted: bool = False) -> Turns | None:
    """The turns on these cores of the server that this process belongs to; None where nobody takes turns."""
    folder = os.environ.get(run_folder.VARIABLE)
    return Turns(Path(folder), cores, counted=counted) if cores and folder and os.path.isdir(folder) else None


class Turns:
    """A place in the queue for some cores, as files that are locked: a process that dies gives up what it holds.

    Two files a core: who wants the core holds its queue until it has the core, so that nobody gets it twice in a row
    while another waits. Cores are always taken in the same order, so groups with several cannot block each other. The
    file of a core holds the number of the turns on it that count.
    """

    def __init__(self, folder: Path, cores: Sequence[int], *, counted: bool = False, patience_s: float = 1.0) -> None:
        """Args:
        folder: where the files are, the same for all that share cores; it must exist.
        cores: numbers of the cores that a turn is for.
        counted: whether the turns that are taken here count in `num_taken`.
        patience_s: after so many seconds it goes on without a turn: work may be long, and a process may be stopped.
            Until the one that was waited for is through, later turns do not wait at all.
        """
        self._counted = counted
        self._patience_s = patience_s
        self._paths = [(folder / f"core-{core}.queue", folder / f"core-{core}") for core in sorted(set(cores))]
        self._given_up: threading.Thread | None = None
        """Still waits for what took too long."""

    @contextlib.contextmanager
    def take(self) -> Iterator[bool]:
        """Within, no other has these cores; False: it took too long, and others may have them."""
        is_stuck = self._given_up is not None and self._given_up.is_alive()
        deadline_s = time.monotonic() + self._patience_s
        with contextlib.ExitStack() as held:
            yield not is_stuck and all(self._take_core(*paths, held, deadline_s) for paths in self._paths)

    @contextlib.contextmanager
    def take_idle(self) -> Iterator[int]:
        """Within, no other has those of these cores that nobody had or waited for; the number of them."""
        with contextlib.ExitStack() as held:
            yield sum(_take_if_free(*paths, held) for paths in self._paths)

    def num_taken(self) -> int:
        """Turns that count so far on the first of these cores, whoever took them."""
        file = _open(self._paths[0][1])
        try:
            return _read_count(file)
        finally:
            os.close(file)

    def are_free(self) -> bool:
        """Whether nobody has any of these cores, or waits for it."""
        return all(_is_free(queue) and _is_free(core) for queue, core in self._paths)

    def _take_core(self, queue: Path, core: Path, held: contextlib.ExitStack, deadline_s: float) -> bool:
        place = self._lock(queue, deadline_s)
        if place is None:
            return False
        try:
            file = self._lock(core, deadline_s)
        finally:
            os.close(place)
        if file is not None:
            held.callback(os.close, file)
            if self._counted:
                # The turn itself does not depend on it, not even on a full disk.
                with contextlib.suppress(OSError):
                    os.pwrite(file, (_read_count(file) + 1).to_bytes(_COUNT_BYTES), 0)
        return file is not None

    def _lock(self, path: Path, deadline_s: float) -> int | None:
        """The file, locked until it is closed; None if that could not be had by `deadline_s`."""
        file = _open(path)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        # flock knows no time-out. It is left to a thread: to look again and again would take the very cores from the
        # one that has them, a thousand times a second.
        locked: Future[int] = Future()
        waiter = threading.Thread(target=_wait, args=(file, locked), name="turns", daemon=True)
        waiter.start()
        try:
            return locked.result(deadline_s - time.monotonic())
        except TimeoutError:
            if not locked.cancel():
                return locked.result()
            self._given_up = waiter
            return None


def _take_if_free(queue: Path, core: Path, held: contextlib.ExitStack) -> bool:
    with contextlib.suppress(OSError), contextlib.ExitStack() as place:
        for path, kept in ((queue, place), (core, held)):
            file = _open(path)
            kept.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _read_count(file: int) -> int:
    return int.from_bytes(os.pread(file, _COUNT_BYTES, 0))


def _is_free(path: Path) -> bool:
    file = _open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def _wait(file: int, locked: Future[int]) -> None:
    fcntl.flock(file, fcntl.LOCK_EX)
    if locked.set_running_or_notify_cancel():
        locked.set_result(file)
    else:
        os.close(file)
