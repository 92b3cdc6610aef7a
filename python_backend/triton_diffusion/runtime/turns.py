"""Turns: the worker groups of several stages take turns on processor cores that they share.

Without a GPU the stages of a server have the same cores. A forward pass ends when its slowest thread does, so two at a
time, each with a thread on every core, take longer than one behind the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_POLL_S = 0.001


class Turns:
    """A place in the queue for some cores, as files that are locked: a process that dies gives up what it holds.

    Two files a core: who wants the core holds its queue until it has the core, so that nobody gets it twice in a row
    while another waits. Cores are always taken in the same order, so groups with several cannot block each other.
    """

    def __init__(self, folder: Path, cores: Sequence[int], patience_s: float = 1.0) -> None:
        """Args:
        folder: where the files are, the same for all that share cores; it must exist.
        cores: numbers of the cores that a turn is for.
        patience_s: after so many seconds it goes on without a turn: work may be long, and a process may be stopped.
        """
        self._patience_s = patience_s
        self._files = [
            (_open(folder / f"core-{core}.queue"), _open(folder / f"core-{core}")) for core in sorted(set(cores))
        ]

    @contextlib.contextmanager
    def take(self) -> Iterator[bool]:
        """Within, no other has these cores; False: it took too long, and others may have them."""
        deadline_s = time.monotonic() + self._patience_s
        held: list[int] = []
        try:
            yield all(self._take_core(queue, core, held, deadline_s) for queue, core in self._files)
        finally:
            for file in held:
                fcntl.flock(file, fcntl.LOCK_UN)

    def _take_core(self, queue: int, core: int, held: list[int], deadline_s: float) -> bool:
        if not _lock(queue, deadline_s):
            return False
        try:
            if has_core := _lock(core, deadline_s):
                held.append(core)
            return has_core
        finally:
            fcntl.flock(queue, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the files."""
        for pair in self._files:
            for file in pair:
                os.close(file)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(file: int, deadline_s: float) -> bool:
    """Whether the lock was had by `deadline_s`; flock itself can only wait for ever, or not at all."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        else:
            return True
