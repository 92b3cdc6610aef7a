"""Spares: processes that have imported all that a rank needs, and wait for the death of one.

A rank that dies is replaced within the time that its weights need; importing torch and diffusers takes many times as
long, and on a machine whose cores are at work much longer still.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from triton_diffusion.runtime.rank_process import RankProcess

logger = logging.getLogger(__name__)

# Other stages start at the same time, and the first requests come: what is for later shall not delay them.
_DELAY_S = 20.0


class Spares:
    """One spare for each rank of a stage model, made when its replica has been up for a while."""

    def __init__(self, start: Callable[[int, int], RankProcess], ranks_per_replica: int) -> None:
        """Args:
        start: a process for (replica, rank); raises OSError when the system starts no more.
        ranks_per_replica: spares of each replica; 0 for none.
        """
        self._start = start
        self._ranks_per_replica = ranks_per_replica
        self._waiting: dict[tuple[int, int], RankProcess] = {}
        self._due_s: dict[int, float] = {}
        """When each replica shall have its spares; time.monotonic()."""

    @property
    def poll_s(self) -> float | None:
        """How soon `start_if_due` must be called though nothing happens."""
        return max(0.0, min(self._due_s.values()) - time.monotonic()) if self._due_s else None

    def plan(self, replica: int) -> None:
        """The replica is up, and shall have spares in a while."""
        if self._ranks_per_replica:
            self._due_s[replica] = time.monotonic() + _DELAY_S

    def start_if_due(self) -> None:
        """Start those whose time has come."""
        now_s = time.monotonic()
        for replica in [replica for replica, due_s in self._due_s.items() if due_s <= now_s]:
            del self._due_s[replica]
            for rank in range(self._ranks_per_replica):
                if (replica, rank) not in self._waiting:
                    self._start_one(replica, rank)

    def _start_one(self, replica: int, rank: int) -> None:
        try:
            self._waiting[replica, rank] = self._start(replica, rank)
        except OSError as error:
            logger.warning("replica %d goes without a spare of rank %d: %s", replica, rank, error)

    def take(self, replica: int, rank: int) -> RankProcess:
        """The spare, or a process that is started now."""
        self._due_s.pop(replica, None)
        spare = self._waiting.pop((replica, rank), None)
        if spare is not None and not spare.has_ended and not spare.is_stopped:
            return spare
        if spare is not None:
            _end(spare)
        return self._start(replica, rank)

    def close(self) -> None:
        """End all."""
        self._due_s.clear()
        for spare in self._waiting.values():
            _end(spare)
        self._waiting.clear()


def _end(spare: RankProcess) -> None:
    spare.kill()
    spare.wait()
    spare.close()
