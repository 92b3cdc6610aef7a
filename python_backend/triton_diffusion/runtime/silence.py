"""How long processes have given no sign of life, as their watcher may judge it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

# A watcher that itself did not run for longer than this cannot say that the others were silent meanwhile: the machine
# was suspended, or as good as.
_LONGEST_TURN_S = 1.0


class Silence:
    """Counts the seconds in which nothing was heard of a process while its watcher could hear it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_s = clock()
        self._last_beats: dict[int, int] = {}
        self._silent_s: dict[int, float] = {}

    def observe(self, beats: Mapping[int, int]) -> dict[int, float]:
        """By process, the seconds since its last sign of life; `beats` are the times of these, in any unit."""
        now_s = self._clock()
        turn_s = min(now_s - self._looked_s, _LONGEST_TURN_S)
        self._looked_s = now_s
        self._silent_s = {
            pid: self._silent_s.get(pid, 0.0) + turn_s if self._last_beats.get(pid) == beat else 0.0
            for pid, beat in beats.items()
        }
        self._last_beats = dict(beats)
        return self._silent_s
