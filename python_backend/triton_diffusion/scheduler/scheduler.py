"""Orders the requests of one stage model.

A request has one or more rows (pictures), a row has one or more steps. A tick is one batch on one replica: rows of
equal batch_key, each at its own step. The batch is formed anew for every tick, so a request joins at the next one and a
row that has done its last step makes room at once. Rows are taken first come, first served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from triton_diffusion.errors import QueueFullError

RowId = tuple[str, int]
"""(request id, index of the row in its request)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the scheduler knows of a request."""

    request_id: str
    batch_key: str
    num_rows: int
    num_steps: int
    tokens: int
    """Sequence length of one row: the cost of one of its steps, up to a factor."""


@dataclass(frozen=True)
class Tick:
    """One batch for one replica."""

    tick_id: int
    replica: int
    rows: tuple[RowId, ...]
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
    started_s: float | None = None
    planned: list[int] = field(default_factory=list)
    """For each row, steps that have been put in a tick."""
    done: list[int] = field(default_factory=list)
    """For each row, steps that have come back."""
    steps_s: list[float] = field(default_factory=list)
    """Duration of each step of row 0."""
    alone: bool = False
    """Shares no batch: it was running when a replica died, and may be the cause."""

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget all progress: the replica that held it is gone."""
        self.planned = [0] * self.work.num_rows
        self.done = [0] * self.work.num_rows
        self.started_s = None
        self.steps_s = []

    @property
    def is_done(self) -> bool:
        """Whether every row has done every step."""
        return all(done == self.work.num_steps for done in self.done)

    @property
    def work_left(self) -> int:
        """Tokens times steps still to be done."""
        return self.work.tokens * (self.work.num_rows * self.work.num_steps - sum(self.done))

    @property
    def step(self) -> int:
        """Steps done, as the average over the rows."""
        return sum(self.done) // self.work.num_rows


class Scheduler:
    """Decides which rows run together next on each replica."""

    def __init__(
        self,
        *,
        num_replicas: int,
        max_queue_size: int,
        max_batch_size: int,
        step_batching: bool,
        clock: Callable[[], float],
    ) -> None:
        """Args:
        num_replicas: worker groups that take ticks.
        max_queue_size: requests that may be here at a time, running ones included.
        max_batch_size: rows of one tick.
        step_batching: False runs one request at a time through all its steps in one tick: the reference loop.
        clock: seconds, monotonic.
        """
        self._num_replicas = num_replicas
        self._available = set(range(num_replicas))
        self._max_queue_size = max_queue_size
        self._max_batch_size = max_batch_size
        self._step_batching = step_batching
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._ticks: dict[int, Tick] = {}
        self._next_tick_id = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def entry(self, request_id: str) -> Entry:
        """How far a request is; raises KeyError when it is not here."""
        return self._entries[request_id]

    def entries(self) -> list[Entry]:
        """All requests that are here, in the order in which they came."""
        return list(self._entries.values())

    def submit(self, work: Work) -> None:
        """Admit a request, and place it on the replica with the least work left.

        Raises:
            QueueFullError: the queue is full.
        """
        if len(self._entries) >= self._max_queue_size:
            raise QueueFullError(
                f"the queue is full: {len(self._entries)} requests wait or run (parameter max_queue_size); "
                "try again later"
            )
        if work.request_id in self._entries:
            raise ValueError(f"request {work.request_id!r} is here already")
        self._entries[work.request_id] = Entry(work, self._least_loaded(), self._clock())

    def next_tick(self, replica: int) -> Tick | None:
        """The batch that `replica` shall run next, or None when it has nothing to do.

        May be called while earlier ticks are still out: their steps count as planned.
        """
        rows = self._choose_rows(replica)
        chosen = {request_id for request_id, _ in rows}
        out = {request_id for tick in self._ticks.values() if tick.replica == replica for request_id, _ in tick.rows}
        is_suspect_among_others = out - chosen and any(self._entries[key].alone for key in out | chosen)
        if not rows or is_suspect_among_others:
            return None
        admissions = []
        for request_id, _ in rows:
            entry = self._entries[request_id]
            if entry.started_s is None:
                entry.started_s = self._clock()
                admissions.append(request_id)
        num_steps = 1 if self._step_batching else self._entries[rows[0][0]].work.num_steps
        for request_id, index in rows:
            self._entries[request_id].planned[index] += num_steps
        tick = Tick(self._next_tick_id, replica, tuple(rows), num_steps, tuple(admissions))
        self._ticks[tick.tick_id] = tick
        self._next_tick_id += 1
        return tick

    def finish_tick(self, tick_id: int, duration_s: float) -> list[str]:
        """Count the steps of a tick that came back; returns the requests that have an end now, in order.

        Rows of requests that were removed meanwhile are passed over, as is a tick of a replica that was reset.
        """
        tick = self._ticks.pop(tick_id, None)
        if tick is None:
            return []
        touched = dict.fromkeys(request_id for request_id, _ in tick.rows if request_id in self._entries)
        for request_id, index in tick.rows:
            if request_id in touched:
                entry = self._entries[request_id]
                entry.done[index] += tick.num_steps
                if index == 0:
                    entry.steps_s += [duration_s / tick.num_steps] * tick.num_steps
        return [request_id for request_id in touched if self._entries[request_id].is_done]

    def remove(self, request_id: str) -> Entry:
        """Take out a request that has ended, failed or was cancelled; raises KeyError when it is not here.

        Ticks that are out forget its rows: they do not count for a later request of the same id.
        """
        entry = self._entries.pop(request_id)
        for tick_id, tick in self._ticks.items():
            rows = tuple(row for row in tick.rows if row[0] != request_id)
            self._ticks[tick_id] = replace(tick, rows=rows)
        return entry

    def requests_in(self, tick_id: int) -> set[str]:
        """The requests of a tick that is out; those that were removed meanwhile do not count."""
        tick = self._ticks.get(tick_id)
        return {request_id for request_id, _ in tick.rows} if tick else set()

    def reset_replica(self, replica: int) -> list[str]:
        """Start the requests of a replica anew: its ranks have lost them. Returns those that had been started.

        These run alone from now on, so that one which kills its ranks again takes no other down with it.
        """
        for tick_id in [tick.tick_id for tick in self._ticks.values() if tick.replica == replica]:
            del self._ticks[tick_id]
        lost = []
        for request_id, entry in self._entries.items():
            if entry.replica == replica and entry.started_s is not None:
                entry.restart()
                entry.alone = True
                lost.append(request_id)
        return lost

    def set_available(self, replica: int, available: bool) -> None:
        """Say whether a replica takes work; what waits for one that does not goes to those that do."""
        if available:
            self._available.add(replica)
            return
        self._available.discard(replica)
        for entry in self._entries.values():
            if self._available and entry.replica == replica and entry.started_s is None:
                entry.replica = self._least_loaded()

    def requests_of(self, replica: int) -> list[str]:
        """The requests that are placed on a replica."""
        return [request_id for request_id, entry in self._entries.items() if entry.replica == replica]

    def _least_loaded(self) -> int:
        left = dict.fromkeys(sorted(self._available) or range(self._num_replicas), 0)
        for entry in self._entries.values():
            if entry.replica in left:
                left[entry.replica] += entry.work_left
        return min(left, key=left.__getitem__)

    def _choose_rows(self, replica: int) -> list[RowId]:
        rows: list[RowId] = []
        batch_key = None
        for request_id, entry in self._entries.items():
            waiting = [index for index, planned in enumerate(entry.planned) if planned < entry.work.num_steps]
            if entry.replica != replica or not waiting or batch_key not in (None, entry.work.batch_key):
                continue
            if entry.alone and rows:
                continue
            if entry.alone or not self._step_batching:
                return [(request_id, index) for index in waiting[: self._max_batch_size]]
            batch_key = entry.work.batch_key
            rows += [(request_id, index) for index in waiting[: self._max_batch_size - len(rows)]]
            if len(rows) == self._max_batch_size:
                break
        return rows
