"""Suspicion: whether a request is what its worker groups die of.

A worker group can die of a request (its values) or beside it (a killed process, a failing device), and no one sees
which, but for memory that is too small: of that a rank leaves word (last_words.py). A request that kills does so again
at the same step; one that gets past the steps that were out at the crash was innocent of it. So what counts is crashes
without such progress: the first may be chance, after the second the request runs alone, so that it takes no other down
with it, and at the third it was alone: it is given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_ALONE_AFTER = 2
GIVEN_UP_AFTER = 3


@dataclass
class Suspicion:
    """What speaks against one request."""

    crashes: int = 0
    """Deaths of a worker group while the same steps of this request were out."""
    _out: list[int] = field(default_factory=list)
    """For each row, the steps that it must have done to be innocent of all of them."""

    def accuse(self, planned: Sequence[int]) -> None:
        """A group died while steps of this request were out: of each row all up to `planned`."""
        self.crashes += 1
        out = self._out or [0] * len(planned)
        self._out = [max(before, now) for before, now in zip(out, planned, strict=True)]

    def weigh(self, done: Sequence[int]) -> bool:
        """Take note of the steps that each row has done; True when that has just cleared the request."""
        if not self.crashes or any(did < out for did, out in zip(done, self._out, strict=True)):
            return False
        self.crashes, self._out = 0, []
        return True

    @property
    def must_be_alone(self) -> bool:
        """Whether it may share no batch."""
        return self.crashes >= _ALONE_AFTER

    @property
    def is_proven(self) -> bool:
        """Whether it is given up."""
        return self.crashes >= GIVEN_UP_AFTER
