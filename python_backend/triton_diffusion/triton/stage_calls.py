"""The BLS calls of a model to the stages, and which of them nobody will ever answer."""

from __future__ import annotations

import itertools
import threading
from typing import NamedTuple

from triton_diffusion.runtime.stub_processes import StageStubs, is_alive
from triton_diffusion.triton.conversion import stage_call


class Stage(NamedTuple):
    """A stage model, and the process in which it runs."""

    model: str
    pid: int | None
    """None: not known."""


class StageCalls:
    """Counts the calls that are lost: Triton (24.10) never ends one to a process that dies meanwhile.

    A lost call keeps the thread that made it, a thread of Triton's pool for this model, and its input.
    """

    def __init__(self) -> None:
        self._stubs = StageStubs()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._under_way: dict[int, int] = {}

    def find(self, model: str) -> Stage:
        """The stage as it runs now."""
        return Stage(model, self._stubs.pid_of(model))

    def call(self, stage: Stage, blob: bytes) -> bytes:
        """Ask a stage and wait for its answer; raises the stage's error."""
        if stage.pid is None:
            return stage_call(stage.model, blob)
        number = next(self._numbers)
        with self._lock:
            self._under_way[number] = stage.pid
        try:
            return stage_call(stage.model, blob)
        finally:
            with self._lock:
                del self._under_way[number]

    def dead(self) -> tuple[set[int], int]:
        """The processes that ended with calls in them, and how many calls these are."""
        with self._lock:
            pids = list(self._under_way.values())
        dead = {pid for pid in set(pids) if not is_alive(pid)}
        return dead, sum(pid in dead for pid in pids)
