"""Restarts: when a worker group that died is started again, and whether it dies again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

from triton_diffusion.config import StageConfig

_LONGEST_BACK_OFF_S = 60.0


class Restarts:
    """The deaths of one replica's worker groups that came in a row.

    In a row are those of groups that had not finished a batch, and had not been up for `crash_loop_window_s` either (a
    group with nothing to do finishes none). `crash_loop_restarts` of them are a crash loop.
    """

    def __init__(self, config: StageConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = config.crash_loop_restarts
        self._window_s = config.crash_loop_window_s
        self._clock = clock
        self._ready_since_s: float | None = None
        self._made_progress = False
        self.in_a_row = 0
        """Deaths in a row."""

    @property
    def is_crash_loop(self) -> bool:
        """Whether the deaths in a row are enough for that; it lasts until a group has finished a batch."""
        return self.in_a_row >= self._limit

    def ready(self) -> None:
        """A group has started."""
        self._ready_since_s = self._clock()

    def progressed(self) -> None:
        """The group has finished a batch."""
        self._made_progress, self.in_a_row = True, 0

    def cause_removed(self) -> None:
        """What the groups died of is gone."""
        self.in_a_row = 0

    def died(self) -> float:
        """The group is gone, or could not start; returns the seconds until the next start: 0, 1, 2, 4 ... 60."""
        stood_s = 0.0 if self._ready_since_s is None else self._clock() - self._ready_since_s
        lived = self._made_progress or stood_s > self._window_s
        self.in_a_row = 0 if lived else self.in_a_row + 1
        self._ready_since_s, self._made_progress = None, False
        return back_off_s(self.in_a_row, _LONGEST_BACK_OFF_S)


def back_off_s(num_deaths: int, longest_s: float) -> float:
    """Seconds to wait after so many deaths: 0 after none, then 1, 2, 4 ... `longest_s`."""
    return min(longest_s, 2.0 ** (num_deaths - 1)) if num_deaths else 0.0
