"""Which rows run next on a replica: three policies, of which "fair" is the default.

A policy decides from plain data and changes nothing; the scheduler applies its choice. scripts/simulate compares them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Protocol

from triton_diffusion.config import PolicyName
from triton_diffusion.scheduler.cost import CostModel
from triton_diffusion.scheduler.work import HIGHEST_PRIORITY, Entry, RowId

# What may interrupt an overdue request has at most this part of its work left.
_MUCH_SHORTER = 5.0
# Under "drr" a request that has waited long compared with what it needs counts at most for so many.
_HIGHEST_WEIGHT = 16.0
# Under "drr" a lane earns at most so many times what another earns, however many more requests it has.
_HIGHEST_RATIO = 16.0

_Rank = tuple[int, bool, float]
"""Smaller goes first."""
_Ranked = list[tuple[_Rank, Entry]]
"""Requests of one lane that wait, in the order in which they came."""
_RANK = itemgetter(0)


@dataclass
class Lane:
    """The requests of one batch_key on one replica, in the order in which they came."""

    batch_key: str
    entries: dict[str, Entry] = field(default_factory=dict)
    credit: float = 0.0
    """Under "drr" the tokens that this lane may run before others have their turn; under "fair" the seconds that it
    owes to shorter requests."""

    def waiting(self) -> list[Entry]:
        """Requests with a step that is in no tick yet."""
        return [entry for entry in self.entries.values() if entry.unplanned]


@dataclass(frozen=True)
class Choice:
    """Rows that shall run together, and the credit of each lane afterwards."""

    rows: tuple[RowId, ...]
    tokens: int
    credits: Mapping[str, float] = field(default_factory=dict)


class Policy(Protocol):
    """How the next batch of a replica is chosen."""

    def choose(self, lanes: Collection[Lane], now_s: float, max_batch_tokens: int) -> Choice | None:
        """The rows of the next tick, all of one lane; None when there are none."""


class FifoPolicy:
    """First come, first served; whoever is of the first one's batch_key comes along."""

    def choose(self, lanes: Collection[Lane], now_s: float, max_batch_tokens: int) -> Choice | None:
        """The lane of the request that came first."""
        waiting = _waiting(lanes)
        if not waiting:
            return None
        first = min(waiting.values(), key=lambda entries: entries[0].submitted_s)
        return _fill(first, max_batch_tokens)


class FairPolicy:
    """By priority, and within a priority by the time at which a request is due.

    A request is due at its deadline, or where it has none, when it has been here for `slowdown` times the time that it
    needs alone (`Entry.due_s`). So a short request passes a long one, all are slowed down alike, and since the time
    does not move with what comes later, nobody is passed over for ever. What is overdue rises by one priority for every
    `ageing_s`: that changes no order within a priority, and lets no higher one starve it.

    The lane of the first one runs, with as many of its other requests as fit, first ones first. A long request that is
    overdue would now keep all others waiting until it is through: it leaves every other second to much shorter ones.
    """

    def __init__(self, cost_model: CostModel, ageing_s: float) -> None:
        self._cost_model = cost_model
        self._ageing_s = ageing_s

    def choose(self, lanes: Collection[Lane], now_s: float, max_batch_tokens: int) -> Choice | None:
        """See the class."""
        waiting = _waiting(lanes)
        if not waiting:
            return None
        if len(waiting) == 1 and _fit_together(entries := next(iter(waiting.values())), max_batch_tokens):
            return _fill(entries, max_batch_tokens)
        ranked = self._ranked(waiting, now_s)
        heads = {key: min(entries, key=_RANK) for key, entries in ranked.items()}
        first = min(heads, key=lambda key: heads[key][0])
        head = heads[first][1]
        batch = _fill_in_order(ranked[first], max_batch_tokens)
        if len(waiting) == 1 or now_s <= self._due_s(head, now_s):
            return batch
        return self._leave_time(head, batch, ranked, {lane.batch_key: lane.credit for lane in lanes}, max_batch_tokens)

    def _leave_time(
        self,
        head: Entry,
        batch: Choice,
        ranked: Mapping[str, _Ranked],
        credit: dict[str, float],
        max_batch_tokens: int,
    ) -> Choice:
        """The batch of an overdue request, or one of much shorter requests that have as much time as it has taken."""
        longest_s = self._cost_model.left_s(head) / _MUCH_SHORTER
        short = [
            (rank, entry)
            for key, entries in ranked.items()
            if key != head.work.batch_key
            for rank, entry in entries
            if entry.work.priority >= head.work.priority and self._cost_model.left_s(entry) <= longest_s
        ]
        if not short:
            return batch
        key = min(short, key=_RANK)[1].work.batch_key
        others = _fill_in_order(ranked[key], max_batch_tokens)
        others_s = self._cost_model.tick_s(others.tokens, key)
        if credit[head.work.batch_key] >= others_s:
            credit[head.work.batch_key] -= others_s
            return Choice(others.rows, others.tokens, credit)
        credit[head.work.batch_key] += self._cost_model.tick_s(batch.tokens, head.work.batch_key)
        return Choice(batch.rows, batch.tokens, credit)

    def _ranked(self, waiting: Mapping[str, list[Entry]], now_s: float) -> dict[str, _Ranked]:
        return {key: [(self._rank(entry, now_s), entry) for entry in entries] for key, entries in waiting.items()}

    def _rank(self, entry: Entry, now_s: float) -> _Rank:
        """Smaller goes first.

        A suspect goes before its equals: it has lost time already, and who else is innocent shows only behind it.
        """
        due_s = entry.due_s if entry.work.deadline_s is None else self._due_s(entry, now_s)
        level = entry.work.priority
        if now_s > due_s:
            level = min(HIGHEST_PRIORITY, level + int((now_s - due_s) / self._ageing_s))
        return -level, not entry.alone, due_s

    def _due_s(self, entry: Entry, now_s: float) -> float:
        deadline_s = entry.work.deadline_s
        if deadline_s is None:
            return entry.due_s
        # One that is missed presses no more: it would only make others miss theirs.
        return max(entry.due_s, deadline_s) if self._cost_model.is_late(entry, now_s) else deadline_s


class DrrPolicy(FairPolicy):
    """By priority, and within a priority lanes take turns by deficit round robin (Shreedhar and Varghese 1995).

    Each lane earns credit and runs when it has enough for the tokens of its batch, so a step of a long video is paid
    for by many of a picture. A lane earns by the number of its requests, each weighing more the longer it has waited
    compared with the work it has left (tokens x steps); no lane earns more than 16 times as fast as another, so that a
    queue that grows for ever starves no lane beside it. Within a lane the order is that of "fair".
    """

    def choose(self, lanes: Collection[Lane], now_s: float, max_batch_tokens: int) -> Choice | None:
        """See the class."""
        waiting = _waiting(lanes)
        if not waiting:
            return None
        ranked = self._ranked(waiting, now_s)
        top = min(rank[0] for entries in ranked.values() for rank, _ in entries)
        leading = {
            key: first
            for key, entries in ranked.items()
            if (first := [entry for rank, entry in entries if rank[0] == top])
        }
        batches = {key: _fill_in_order(ranked[key], max_batch_tokens) for key in leading}
        if len(leading) == 1:
            return next(iter(batches.values()))
        credit = {lane.batch_key: lane.credit for lane in lanes}
        needs = {key: sum(self._weight(entry, now_s) for entry in entries) for key, entries in leading.items()}
        highest = min(needs.values()) * _HIGHEST_RATIO
        weights = {key: min(need, highest) for key, need in needs.items()}
        turns = {key: max(0.0, batches[key].tokens - credit[key]) / weights[key] for key in leading}
        chosen = min(turns, key=turns.__getitem__)
        for key, weight in weights.items():
            credit[key] += turns[chosen] * weight
        credit[chosen] -= batches[chosen].tokens
        return Choice(batches[chosen].rows, batches[chosen].tokens, credit)

    def _weight(self, entry: Entry, now_s: float) -> float:
        left_s = self._cost_model.left_s(entry)
        return min(1.0 + entry.waited_s(now_s) / left_s, _HIGHEST_WEIGHT) if left_s else 1.0


def make_policy(name: PolicyName, cost_model: CostModel, ageing_s: float) -> Policy:
    """The policy of that name."""
    match name:
        case "fair":
            return FairPolicy(cost_model, ageing_s)
        case "drr":
            return DrrPolicy(cost_model, ageing_s)
        case "fifo":
            return FifoPolicy()


def _waiting(lanes: Iterable[Lane]) -> dict[str, list[Entry]]:
    """By batch key, the requests of each lane that wait for a step, in the order in which they came."""
    return {lane.batch_key: entries for lane in lanes if (entries := lane.waiting())}


def _fit_together(entries: Iterable[Entry], max_batch_tokens: int) -> bool:
    """Whether one batch takes them all, in whatever order."""
    tokens = 0
    for entry in entries:
        tokens += entry.work.tokens * entry.work.num_rows
        if tokens > max_batch_tokens or entry.alone:
            return False
    return True


def _fill_in_order(ranked: _Ranked, max_batch_tokens: int) -> Choice:
    return _fill((entry for _, entry in sorted(ranked, key=_RANK)), max_batch_tokens)


def _fill(entries: Iterable[Entry], max_batch_tokens: int) -> Choice:
    """Rows of requests of one lane, as many as fit; the first one always does. A suspect shares with none."""
    chosen: list[tuple[Entry, list[int]]] = []
    tokens = 0
    for entry in entries:
        if entry.alone and chosen:
            continue
        fitting = max((max_batch_tokens - tokens) // entry.work.tokens, 0 if chosen else 1)
        if fitting:
            rows = entry.waiting_rows()[:fitting]
            chosen.append((entry, rows))
            tokens += entry.work.tokens * len(rows)
        if entry.alone or tokens >= max_batch_tokens:
            break
    # In one order at every step: what was put together for the last batch of the same rows can be used again.
    chosen.sort(key=lambda item: (item[0].submitted_s, item[0].work.request_id))
    return Choice(tuple((entry.work.request_id, index) for entry, rows in chosen for index in rows), tokens)
