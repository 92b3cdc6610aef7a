"""What the scheduler knows of requests: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

RowId = tuple[str, int]
"""(request id, index of the row in its request)."""

DeadlineAction = Literal["refuse", "drop", "continue"]

LOWEST_PRIORITY, DEFAULT_PRIORITY, HIGHEST_PRIORITY = 0, 5, 9


@dataclass(frozen=True, kw_only=True)
class Work:
    """A request as the scheduler sees it."""

    request_id: str
    batch_key: str
    """Rows of equal key may share a forward pass."""
    num_rows: int
    num_steps: int
    tokens: int
    """Sequence length that one row adds to a forward pass; with guidance that of both predictions."""
    priority: int = DEFAULT_PRIORITY
    """9 goes before 8, and so on down to 0."""
    deadline_s: float | None = None
    """Reading of the scheduler's clock by which this stage should be through; None for none."""
    deadline_action: DeadlineAction = "refuse"
    """What becomes of a request that cannot meet its deadline: "refuse" it when it comes, or drop it later; "drop" it
    once it cannot be met any more, but try; "continue" in spite of it."""

    @property
    def cost(self) -> int:
        """Tokens times steps, of all rows."""
        return self.tokens * self.num_rows * self.num_steps


@dataclass(frozen=True)
class Tick:
    """One batch for one replica."""

    tick_id: int
    replica: int
    batch_key: str
    rows: tuple[RowId, ...]
    tokens: int
    num_steps: int
    """Steps that every row does in this tick: 1, or all of them in the reference loop."""
    admissions: tuple[str, ...]
    """Requests that the replica has not been sent yet."""


@dataclass
class Entry:
    """A request on its way through the scheduler; times are readings of its clock."""

    work: Work
    replica: int
    submitted_s: float
    due_s: float = 0.0
    """When it should be through for the sake of fairness, whatever its deadline."""
    started_s: float | None = None
    planned: list[int] = field(default_factory=list)
    """For each row, steps that have been put in a tick."""
    done: list[int] = field(default_factory=list)
    """For each row, steps that have come back."""
    kept: list[int] = field(default_factory=list)
    """For each row, steps that are in its last checkpoint: what a death of the ranks does not take."""
    steps_s: list[float] = field(default_factory=list)
    """Duration of each step of row 0."""
    alone: bool = False
    """Shares no batch: it was running when a replica died, and may be the cause."""
    ticks_out: int = 0
    """Ticks with a row of this request that have not come back."""
    steps_left: int = 0
    """Steps of all rows that have not come back."""
    unplanned: int = 0
    """Steps of all rows that have not been put in a tick."""
    _waited_s: float = 0.0
    _waits_since_s: float = 0.0

    def __post_init__(self) -> None:
        self._waits_since_s = self.submitted_s
        self.kept = [0] * self.work.num_rows
        self._go_back()

    def _go_back(self) -> None:
        """To what is kept."""
        self.planned = list(self.kept)
        self.done = list(self.kept)
        self.steps_left = self.unplanned = self.work.num_rows * self.work.num_steps - sum(self.kept)
        self.started_s = None
        self.steps_s = self.steps_s[: self.kept[0]]
        self.ticks_out = 0

    def keep(self, done: Sequence[int]) -> bool:
        """Take note of a checkpoint; False, and nothing changes, where it is not one of this request's own past."""
        if len(done) != self.work.num_rows or any(
            not kept <= steps <= came_back for kept, steps, came_back in zip(self.kept, done, self.done, strict=True)
        ):
            return False
        self.kept = list(done)
        return True

    def lose_checkpoint(self) -> None:
        """What was in the last checkpoint is to be done again, by the ticks that are out, too: they began there."""
        self.planned = [planned - kept for planned, kept in zip(self.planned, self.kept, strict=True)]
        self.done = [done - kept for done, kept in zip(self.done, self.kept, strict=True)]
        self.steps_s = self.steps_s[self.kept[0] :]
        self.steps_left += sum(self.kept)
        self.unplanned += sum(self.kept)
        self.kept = [0] * self.work.num_rows

    def restart(self, now_s: float) -> None:
        """Go back to the last checkpoint, or to the beginning: the replica that held the rest is gone."""
        if self.ticks_out:
            self._waits_since_s = now_s
        self._go_back()

    def leave(self, rows: int, num_steps: int, now_s: float) -> None:
        """Note that a tick takes `rows` rows of this request `num_steps` further."""
        if not self.ticks_out:
            self._waited_s += now_s - self._waits_since_s
        self.ticks_out += 1
        self.unplanned -= rows * num_steps

    def come_back(self, rows: int, num_steps: int, now_s: float) -> None:
        """Note that such a tick is through."""
        self.ticks_out -= 1
        self.steps_left -= rows * num_steps
        if not self.ticks_out:
            self._waits_since_s = now_s

    def waited_s(self, now_s: float) -> float:
        """Seconds that this request has spent here outside of ticks."""
        return self._waited_s if self.ticks_out else self._waited_s + now_s - self._waits_since_s

    @property
    def is_done(self) -> bool:
        """Whether every row has done every step."""
        return self.steps_left == 0

    @property
    def work_left(self) -> int:
        """Tokens times steps still to be done."""
        return self.work.tokens * self.steps_left

    @property
    def step(self) -> int:
        """Steps done, as the average over the rows."""
        return sum(self.done) // self.work.num_rows

    def waiting_rows(self) -> list[int]:
        """Rows that have a step which is in no tick yet."""
        return [index for index, planned in enumerate(self.planned) if planned < self.work.num_steps]
