"""Orders the requests of one stage model.

A request has one or more rows (pictures), a row has one or more steps. A tick is one batch on one replica: rows of
equal batch_key, each at its own step, as many as max_batch_tokens allows. The batch is chosen anew for every tick (see
policy.py), so a request joins at the next one and a row that has done its last step makes room at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from triton_diffusion.config import PolicyName
from triton_diffusion.errors import DeadlineExceededError, QueueFullError
from triton_diffusion.scheduler.cost import CostModel, Measurement
from triton_diffusion.scheduler.policy import Choice, Lane, make_policy
from triton_diffusion.scheduler.work import DEFAULT_PRIORITY, Entry, Tick, Work

SEND_AHEAD_BELOW_S = 0.05
"""While one tick runs, the next may wait at the rank, so that the device never waits for the scheduler. But what is
sent cannot be chosen anew: where the ticks that are out take longer than this, it is chosen when they are through.
"""

# The part of the time of a lone row that company must save it.
_WORTHWHILE = 0.1


@dataclass
class _Replica:
    """The requests that are placed on one replica."""

    entries: dict[str, Entry] = field(default_factory=dict)
    lanes: dict[str, Lane] = field(default_factory=dict)
    ticks: dict[int, Tick] = field(default_factory=dict)
    """Those that are out."""
    work_left: int = 0

    def add(self, entry: Entry) -> None:
        key = entry.work.batch_key
        if key not in self.lanes:
            self.lanes[key] = Lane(key)
        self.entries[entry.work.request_id] = self.lanes[key].entries[entry.work.request_id] = entry
        self.work_left += entry.work_left

    def discard(self, entry: Entry) -> None:
        request_id, key = entry.work.request_id, entry.work.batch_key
        del self.entries[request_id]
        del self.lanes[key].entries[request_id]
        if not self.lanes[key].entries:
            del self.lanes[key]
        self.work_left -= entry.work_left


class Scheduler:
    """Decides which requests are taken, where each runs, and which rows run together next on each replica."""

    def __init__(
        self,
        *,
        num_replicas: int,
        max_queue_size: int,
        max_batch_tokens: int,
        clock: Callable[[], float],
        max_queue_cost: int | None = None,
        step_batching: bool = True,
        policy: PolicyName = "fair",
        slowdown: float = 5.0,
        ageing_s: float = 30.0,
        cost_model: CostModel | None = None,
    ) -> None:
        """Args:
        num_replicas: worker groups that take ticks.
        max_queue_size: requests that may be here at a time, running ones included.
        max_batch_tokens: tokens of one tick; a single row runs even if it has more.
        clock: seconds, monotonic.
        max_queue_cost: tokens x steps that may be here at a time; a single request may have more. None: no limit.
        step_batching: False runs one request at a time through all its steps in one tick: the reference loop.
        policy: see policy.py.
        slowdown: a request without a deadline is due after so many times the time that it needs alone.
        ageing_s: seconds overdue that raise a priority by 1.
        cost_model: for estimates; without one they come from the ticks alone.
        """
        self.max_batch_tokens = max_batch_tokens
        self.cost_model = cost_model or CostModel()
        self._max_queue_size = max_queue_size
        self._max_queue_cost = max_queue_cost
        self._step_batching = step_batching
        self._clock = clock
        self._slowdown = slowdown
        self._policy = make_policy(policy if step_batching else "fifo", self.cost_model, ageing_s)
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._available = list(range(num_replicas))
        self._entries: dict[str, Entry] = {}
        self._tick_replicas: dict[int, int] = {}
        self._next_tick_id = 0
        self.num_deadlines = 0
        """Requests here that have a deadline."""

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

    def learn_limits(self, max_batch_tokens: int, measurements: Sequence[Measurement] = ()) -> None:
        """Take over what a replica has measured, or learnt later from running out of memory; the smallest batch of all
        replicas holds for all.
        """
        self.max_batch_tokens = min(self.max_batch_tokens, max_batch_tokens)
        self.cost_model.learn(measurements)

    # Admission.

    def submit(self, work: Work) -> None:
        """Admit a request, and place it on the replica with the least work left.

        Raises:
            QueueFullError: the queue is full, by number or by work.
            DeadlineExceededError: the deadline cannot be met, and the request wants to be refused then.
        """
        if work.request_id in self._entries:
            raise ValueError(f"request {work.request_id!r} is here already")
        self._check_room(work)
        now_s = self._clock()
        index = self._least_loaded()
        if work.deadline_s is not None and work.deadline_action == "refuse":
            self._check_deadline(work, work.deadline_s - now_s, self._replicas[index], now_s)
        entry = Entry(work, index, now_s)
        entry.due_s = now_s + self._slowdown * self.cost_model.needed_s(entry)
        self._entries[work.request_id] = entry
        self._replicas[index].add(entry)
        self.num_deadlines += work.deadline_s is not None

    def expected_wait_s(self) -> float:
        """Seconds until all that is here will be through, by estimate."""
        available = [self._replicas[index] for index in self._available] or self._replicas
        return max(self.cost_model.work_s(replica.work_left) for replica in available)

    def _work_left(self) -> int:
        return sum(replica.work_left for replica in self._replicas)

    def _check_room(self, work: Work) -> None:
        here = len(self._entries)
        full_by = None
        if here >= self._max_queue_size:
            full_by = f"max_queue_size={self._max_queue_size}"
        elif self._max_queue_cost is not None and here and self._work_left() + work.cost > self._max_queue_cost:
            full_by = f"max_queue_cost={self._max_queue_cost} tokens x steps; this one asks for {work.cost} more"
        if full_by is not None:
            cost = self._work_left()
            raise QueueFullError(
                f"the queue is full: {here} requests with {cost} tokens x steps wait or run (parameter {full_by}); "
                f"they need about {self.expected_wait_s():.1f} s; try again later"
            )

    def _check_deadline(self, work: Work, left_s: float, replica: _Replica, now_s: float) -> None:
        """Refuse what would be late even though only more urgent requests go first."""
        candidate = Entry(work, 0, now_s)
        needed_s = self.cost_model.needed_s(candidate)
        ahead = [
            entry
            for entry in replica.entries.values()
            if _goes_before(entry.work, work) and not self.cost_model.is_late(entry, now_s)
        ]
        fits = work.tokens * work.num_rows + sum(e.work.tokens * e.work.num_rows for e in ahead)
        in_its_batch = fits <= self.max_batch_tokens
        waits_for = [e for e in ahead if not (in_its_batch and e.work.batch_key == work.batch_key)]
        waiting_s = sum(map(self.cost_model.left_s, waits_for))
        if waiting_s + needed_s > left_s:
            raise DeadlineExceededError(
                f"the deadline cannot be met: {max(left_s, 0.0):.2f} s are left of it, and about "
                f"{waiting_s + needed_s:.2f} s are needed here, {waiting_s:.2f} s of them behind {len(waits_for)} "
                "requests that go first; allow more with deadline_s, ask for fewer steps, or send deadline_action=drop "
                "to have it tried"
            )

    def late_requests(self, replica: int) -> list[str]:
        """Requests of a replica that cannot meet their deadline any more and do not want to be finished late."""
        now_s = self._clock()
        return [
            request_id
            for request_id, entry in self._replicas[replica].entries.items()
            if entry.work.deadline_s is not None
            and entry.work.deadline_action != "continue"
            and self.cost_model.is_late(entry, now_s)
        ]

    # Ticks.

    def next_tick(self, replica: int) -> Tick | None:
        """The batch that `replica` shall run next, or None when it has nothing to do.

        May be called while earlier ticks are still out: their steps count as planned.
        """
        queue = self._replicas[replica]
        now_s = self._clock()
        choice = self._choose(queue, now_s)
        if choice is None or _mixes_suspects(queue, choice):
            return None
        for key, credit in choice.credits.items():
            queue.lanes[key].credit = credit
        first = queue.entries[choice.rows[0][0]]
        num_steps = 1 if self._step_batching else first.work.num_steps
        admissions = []
        for request_id, indices in _by_request(choice.rows).items():
            entry = queue.entries[request_id]
            if entry.started_s is None:
                entry.started_s = now_s
                admissions.append(request_id)
            entry.leave(len(indices), num_steps, now_s)
            for index in indices:
                entry.planned[index] += num_steps
        tick = Tick(
            tick_id=self._next_tick_id,
            replica=replica,
            batch_key=first.work.batch_key,
            rows=choice.rows,
            tokens=choice.tokens,
            num_steps=num_steps,
            admissions=tuple(admissions),
        )
        self._next_tick_id += 1
        queue.ticks[tick.tick_id] = tick
        self._tick_replicas[tick.tick_id] = replica
        return tick

    def gains_by_waiting(self, replica: int) -> bool:
        """Whether what waits on `replica` would take less of its time together with what may come.

        Only of requests of a single step, which take no other chance to meet; not of those that are in a hurry.
        """
        if self.cost_model.gain < _WORTHWHILE:
            return False
        waiting = [entry for entry in self._replicas[replica].entries.values() if entry.unplanned]
        if any(map(_is_in_a_hurry, waiting)):
            return False
        tokens = sum(entry.work.tokens * entry.work.num_rows for entry in waiting)
        return 0 < tokens < self.max_batch_tokens

    def is_alone(self, replica: int) -> bool:
        """Whether no other replica has a request."""
        return len(self._replicas[replica].entries) == len(self._entries)

    def finish_tick(self, tick_id: int, duration_s: float) -> list[str]:
        """Count the steps of a tick that came back; returns the requests that have an end now, in order.

        Rows of requests that were removed meanwhile are passed over, as is a tick of a replica that was reset.
        """
        replica = self._tick_replicas.pop(tick_id, None)
        if replica is None:
            return []
        queue = self._replicas[replica]
        tick = queue.ticks.pop(tick_id)
        step_s = duration_s / tick.num_steps
        now_s = self._clock()
        ended = []
        for request_id, indices in _by_request(tick.rows).items():
            entry = queue.entries[request_id]
            for index in indices:
                entry.done[index] += tick.num_steps
            if 0 in indices:
                entry.steps_s += [step_s] * tick.num_steps
            queue.work_left -= entry.work.tokens * len(indices) * tick.num_steps
            entry.come_back(len(indices), tick.num_steps, now_s)
            if entry.is_done:
                ended.append(request_id)
        return ended

    def observe(self, tick: Tick, duration_s: float) -> None:
        """Learn from a tick that ran undisturbed what such a tick takes."""
        self.cost_model.observe(tick.tokens, duration_s / tick.num_steps, tick.batch_key)

    def estimate_out_s(self, replica: int) -> float:
        """Seconds that the ticks of a replica which are out will take together."""
        ticks = self._replicas[replica].ticks.values()
        return sum(self.cost_model.tick_s(tick.tokens, tick.batch_key) * tick.num_steps for tick in ticks)

    def tick(self, tick_id: int) -> Tick | None:
        """A tick that is out, without the rows of requests that were removed meanwhile."""
        replica = self._tick_replicas.get(tick_id)
        return None if replica is None else self._replicas[replica].ticks[tick_id]

    def remove(self, request_id: str) -> Entry:
        """Take out a request that has ended, failed or was cancelled; raises KeyError when it is not here.

        Ticks that are out forget its rows: they do not count for a later request of the same id.
        """
        entry = self._entries.pop(request_id)
        self.num_deadlines -= entry.work.deadline_s is not None
        queue = self._replicas[entry.replica]
        queue.discard(entry)
        if entry.ticks_out:
            for tick_id, tick in queue.ticks.items():
                rows = tuple(row for row in tick.rows if row[0] != request_id)
                if rows != tick.rows:
                    # Whether the ranks still ran the row is not known, and so not what the tick cost.
                    queue.ticks[tick_id] = replace(tick, rows=rows, tokens=0)
        return entry

    # Replicas.

    def keep(self, request_id: str, done: Sequence[int]) -> bool:
        """Take note of a checkpoint: from these steps of each row a request goes on when its replica is reset.

        False where it cannot be one of this request, such as that of an earlier one of the same id: then its blob must
        not be used. Raises KeyError when the request is not here.
        """
        return self._entries[request_id].keep(done)

    def lose_checkpoint(self, request_id: str) -> None:
        """Take note that a request could not go on from its last checkpoint, and has begun with the first of the ticks
        that are out. Raises KeyError when the request is not here.
        """
        entry = self._entries[request_id]
        queue = self._replicas[entry.replica]
        queue.work_left -= entry.work_left
        entry.lose_checkpoint()
        queue.work_left += entry.work_left

    def reset_replica(self, replica: int, *, alone: Collection[str] | None = None) -> list[str]:
        """Take the requests of a replica back to their last checkpoint, or to their beginning where there is none: its
        ranks have lost them. Returns those that had been started; they are not any more, so they can move.

        alone: those that run alone from now on, so that one which kills its ranks again takes no other down with it;
        None: all.
        """
        queue = self._replicas[replica]
        for tick_id in queue.ticks:
            del self._tick_replicas[tick_id]
        queue.ticks.clear()
        lost = [request_id for request_id, entry in queue.entries.items() if entry.started_s is not None]
        now_s = self._clock()
        for request_id in lost:
            entry = queue.entries[request_id]
            queue.work_left -= entry.work_left
            entry.restart(now_s)
            queue.work_left += entry.work_left
            entry.alone = alone is None or request_id in alone
        return lost

    def set_available(self, replica: int, available: bool, *, keep: Collection[str] = ()) -> list[str]:
        """Say whether a replica takes work. What is not started and waits for one that does not goes to those that do,
        but for `keep`; one that takes work again is given its part of what waits elsewhere. Returns what has moved.
        """
        indices = {*self._available, replica} if available else {*self._available} - {replica}
        self._available = sorted(indices)
        if available:
            return self._share_with(replica)
        if not self._available:
            return []
        waiting = [
            request_id
            for request_id, entry in self._replicas[replica].entries.items()
            if entry.started_s is None and request_id not in keep
        ]
        for request_id in waiting:
            self._move(self._entries[request_id], self._least_loaded())
        return waiting

    def _share_with(self, replica: int) -> list[str]:
        """Give a replica what is due last elsewhere and not started, until it has no less work than they."""
        queue = self._replicas[replica]
        waiting = [
            entry
            for entry in self._entries.values()
            if entry.replica != replica and entry.started_s is None and not entry.alone
        ]
        moved = []
        for entry in sorted(waiting, key=lambda entry: entry.due_s, reverse=True):
            if self._replicas[entry.replica].work_left - entry.work_left >= queue.work_left + entry.work_left:
                self._move(entry, replica)
                moved.append(entry.work.request_id)
        return moved

    def _move(self, entry: Entry, replica: int) -> None:
        self._replicas[entry.replica].discard(entry)
        entry.replica = replica
        self._replicas[replica].add(entry)

    def requests_of(self, replica: int) -> list[str]:
        """The requests that are placed on a replica."""
        return list(self._replicas[replica].entries)

    def _least_loaded(self) -> int:
        indices = self._available or range(len(self._replicas))
        work_left = [self._replicas[index].work_left for index in indices]
        return indices[work_left.index(min(work_left))]

    def _choose(self, queue: _Replica, now_s: float) -> Choice | None:
        if self._step_batching:
            return self._policy.choose(queue.lanes.values(), now_s, self.max_batch_tokens)
        # The reference loop: the first request that waits, in a lane of its own.
        for entry in queue.entries.values():
            if entry.unplanned:
                lane = Lane(entry.work.batch_key, {entry.work.request_id: entry})
                return self._policy.choose([lane], now_s, self.max_batch_tokens)
        return None


def _is_in_a_hurry(entry: Entry) -> bool:
    work = entry.work
    return entry.alone or work.num_steps > 1 or work.deadline_s is not None or work.priority > DEFAULT_PRIORITY


def _goes_before(work: Work, other: Work) -> bool:
    """Whether `work` goes before `other`, which has a deadline and is urgent."""
    if work.priority != other.priority:
        return work.priority > other.priority
    assert other.deadline_s is not None
    return work.deadline_s is not None and work.deadline_s <= other.deadline_s


def _mixes_suspects(queue: _Replica, choice: Choice) -> bool:
    """Whether a suspect would be out together with another request."""
    if not queue.ticks:
        return False
    chosen = {request_id for request_id, _ in choice.rows}
    out = {request_id for tick in queue.ticks.values() for request_id, _ in tick.rows}
    return bool(out - chosen) and any(queue.entries[request_id].alone for request_id in out | chosen)


def _by_request(rows: tuple[tuple[str, int], ...]) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for request_id, index in rows:
        grouped.setdefault(request_id, []).append(index)
    return grouped
