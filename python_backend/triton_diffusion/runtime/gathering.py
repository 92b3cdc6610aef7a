"""Gathering: on cores that are at work for another stage, a request waits a little for others to share its tick.

A tick of one picture costs almost as much as one of several where the cost is mostly that of starting operators, so
stages that run one picture after the other take the cores from the steps of all others. Pictures that have shared a
tick also come back together, so their next requests do, too, and share the steps that follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from triton_diffusion.runtime.turns import Turns

# How soon it is looked again whether the waiting is over.
_POLL_S = 0.005
_MAX_TURNS = 2
# As for turns themselves: a step may be long, and a process that has the cores may be stopped.
_PATIENCE_S = 1.0


class Gathering:
    """Decides for one replica when the requests that wait there have waited long enough.

    In steps of others, not in seconds: so it is a small part of the time that a request takes, whatever its size, and
    at a low load, when steps are short, next to nothing.
    """

    def __init__(self, turns: Turns | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        turns: those on the replica's cores; None: it shares them with nobody, and nothing waits.
        clock: seconds, monotonic.
        """
        self._turns = turns
        self._clock = clock
        self._began: tuple[float, int] | None = None
        """When the waiting began, and how many turns had been taken by then."""

    @property
    def poll_s(self) -> float | None:
        """How soon `shall_wait` must be asked again; None: nothing waits."""
        return None if self._began is None else _POLL_S

    def shall_wait(self, gains: Callable[[], bool]) -> bool:
        """Whether the requests that are here shall wait.

        gains: tells whether a larger batch would be better; not asked where nothing could wait.
        """
        if self._turns is None or not gains() or not self._has_patience(self._turns):
            self._began = None
        return self._began is not None

    def _has_patience(self, turns: Turns) -> bool:
        try:
            if turns.are_free():
                return False
            num_taken = turns.num_taken()
        except OSError:
            # The server ends, and its folder is gone; or there are no descriptors left. Nobody shall wait for that.
            return False
        now_s = self._clock()
        began_s, taken_then = self._began = self._began or (now_s, num_taken)
        return num_taken - taken_then < _MAX_TURNS and now_s - began_s < _PATIENCE_S
