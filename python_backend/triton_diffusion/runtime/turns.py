"""Turns: the stages of a server that compute on the same cores do so one after the other."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator


class Turns:
    """A lock that all worker groups of a server share, for ticks on the CPU.

    A thread that loses its core to another stage holds up all others of its tick, which wait for it at the end of every
    layer. So a tick has the cores for itself, as on a GPU. Whoever waits comes next: a stage that goes on without a
    pause does not shut the others out.
    """

    def __init__(self, folder: str) -> None:
        """folder: an existing one that the groups agree on; nothing is written there. Empty: no turns are taken."""
        self._descriptors = [os.open(path, os.O_RDONLY) for path in (folder, os.path.join(folder, "..")) if folder]

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn, and have it until the end of the block."""
        if not self._descriptors:
            yield
            return
        turn, door = self._descriptors
        # Who waits for the turn holds the door, and so is before those that come later.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(turn, fcntl.LOCK_UN)
