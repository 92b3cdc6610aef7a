"""How long a forward pass takes, from measurements: for estimates, never for correctness."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from triton_diffusion.scheduler.work import Entry

Measurement = tuple[int, float]
"""(tokens in the batch, seconds of the tick)."""

# Weight of the newest observation in the running mean. A tick can be slow for many reasons (the first of its size, a
# busy machine), but is fast for one only: so the mean follows fast ones sooner, and estimates are rather too short.
_WEIGHT_SLOWER, _WEIGHT_FASTER = 0.1, 0.5
# Sizes whose own speed is remembered; a caller may send any number of sizes.
_MAX_KEYS = 256


class CostModel:
    """Seconds of a tick as a function of its tokens: a measured table, corrected by what ticks really take.

    The table comes from one size of picture. Attention is not linear in the length of a sequence, so each batch_key
    has a factor of its own, the running mean of observed over predicted.
    """

    def __init__(self, measured: Sequence[Measurement] = ()) -> None:
        self._measured: list[Measurement] = []
        self._seconds_per_token = 0.0
        """At the size that is fastest a token."""
        self._factors: dict[str, float] = {}
        self._take_over(measured)

    def learn(self, measured: Sequence[Measurement]) -> None:
        """Replace the table, unless there is nothing new to replace it by."""
        if measured and sorted(measured) != self._measured:
            self._take_over(measured)
            self._factors.clear()

    def tick_s(self, tokens: int, batch_key: str = "") -> float:
        """Seconds of a tick; 0 as long as nothing is known."""
        return self._predict(tokens) * self._factors.get(batch_key, 1.0)

    @property
    def gain(self) -> float:
        """The part of the time of a lone row of the measured size that it saves in the best company."""
        if not self._measured:
            return 0.0
        tokens, seconds = self._measured[0]
        return 1 - self._seconds_per_token / (seconds / tokens)

    def work_s(self, cost: int, batch_key: str = "") -> float:
        """Seconds of `cost` tokens x steps in batches of the size that is fastest a token."""
        return cost * self._seconds_per_token * self._factors.get(batch_key, 1.0)

    def needed_s(self, entry: Entry) -> float:
        """Seconds until a request could be through if it had the replica to itself; what runs counts as done."""
        steps = entry.work.num_steps - min(entry.planned)
        return steps * self.tick_s(entry.work.tokens * entry.work.num_rows, entry.work.batch_key)

    def left_s(self, entry: Entry) -> float:
        """Seconds of the replica that a request has yet to take, in the best company."""
        return self.work_s(entry.work_left, entry.work.batch_key)

    def is_late(self, entry: Entry, now_s: float) -> bool:
        """Whether a request would miss its deadline even if it had the replica to itself from now on."""
        deadline_s = entry.work.deadline_s
        return deadline_s is not None and now_s + self.needed_s(entry) > deadline_s

    def observe(self, tokens: int, seconds: float, batch_key: str = "") -> None:
        """Take in what a tick took."""
        if tokens <= 0 or seconds <= 0:
            return
        if not self._measured:
            self._take_over([(tokens, seconds)])
            return
        ratio = seconds / self._predict(tokens)
        if batch_key not in self._factors and len(self._factors) >= _MAX_KEYS:
            del self._factors[next(iter(self._factors))]
        first = batch_key not in self._factors
        known = self._factors.pop(batch_key, 1.0)
        weight = _WEIGHT_FASTER if first or ratio < known else _WEIGHT_SLOWER
        self._factors[batch_key] = known + weight * (ratio - known)

    def _take_over(self, measured: Sequence[Measurement]) -> None:
        self._measured = sorted(measured)
        self._seconds_per_token = min((seconds / tokens for tokens, seconds in measured), default=0.0)

    def _predict(self, tokens: int) -> float:
        """Linear between measurements; in proportion to the nearest one outside of them."""
        table = self._measured
        if not table:
            return 0.0
        index = bisect_left(table, (tokens, 0.0))
        if index < len(table) and table[index][0] == tokens:
            return table[index][1]
        if index in (0, len(table)):
            nearest_tokens, nearest_s = table[min(index, len(table) - 1)]
            return nearest_s * tokens / nearest_tokens
        (low_tokens, low_s), (high_tokens, high_s) = table[index - 1], table[index]
        return low_s + (high_s - low_s) * (tokens - low_tokens) / (high_tokens - low_tokens)
