"""Watchdog: notices that the ranks of a worker group are stuck in a tick, by the time that such ticks take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triton_diffusion.config import StageConfig
from triton_diffusion.scheduler import Tick

# Weight of the newest tick in the running mean. The mean follows slow ones at once: a busy machine is no hang.
_WEIGHT_SLOWER, _WEIGHT_FASTER = 0.5, 0.1
# Kinds of ticks that are remembered; a caller may send any number of sizes.
_MAX_KINDS = 4096
# Seconds that one look adds at most: a service that was itself kept from running cannot tell what its ranks did.
_MAX_GAP_S = 2.0


@dataclass(frozen=True)
class _Out:
    """A tick that is out."""

    tick: Tick
    expected_s: float
    """By the cost model; 0 where it knows nothing."""

    @property
    def kind(self) -> tuple[str, int]:
        """What has its own compilations, tuning and lazy loads."""
        return self.tick.batch_key, self.tick.tokens


class Watchdog:
    """Over the ticks that are out at one worker group, which runs them one after the other."""

    def __init__(self, config: StageConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._factor = config.watchdog_factor
        self._floor_s = config.watchdog_floor_s
        self._ceiling_s = config.watchdog_ceiling_s
        self._clock = clock
        self._out: deque[_Out] = deque()
        self._seen: set[tuple[str, int]] = set()
        self._step_s: dict[str, float] = {}
        self._silent_s = self._stopped_s = 0.0
        self._looked_s = clock()

    def __len__(self) -> int:
        """Ticks that are out."""
        return len(self._out)

    @property
    def poll_s(self) -> float | None:
        """How often to look at least; None: nothing is out."""
        return min(_MAX_GAP_S / 2, self._floor_s / 4) if self._out and self._ceiling_s else None

    def sent(self, tick: Tick, expected_s: float) -> None:
        """A tick goes out; `expected_s` is what the cost model says."""
        if not self._out:
            self._begin()
        self._out.append(_Out(tick, expected_s))

    def done(self, tick_id: int, duration_s: float) -> None:
        """A tick came back."""
        while self._out:
            out = self._out.popleft()
            if out.tick.tick_id == tick_id:
                self._learn(out, duration_s)
                break
        self._begin()

    def forget(self) -> None:
        """The group is gone: its next one runs everything for the first time."""
        self._out.clear()
        self._seen.clear()

    def look(self, stopped_ranks: Callable[[], Sequence[int]]) -> str | None:
        """What is wrong with the tick that runs, or None; to be called every `poll_s` seconds.

        Args:
        stopped_ranks: ranks that a signal has stopped; asked only when the group has been silent for a while.
        """
        now_s = self._clock()
        gap_s, self._looked_s = min(now_s - self._looked_s, _MAX_GAP_S), now_s
        if not self._out or not self._ceiling_s:
            return None
        self._silent_s += gap_s
        if self._silent_s < self._floor_s / 4:
            return None
        stopped = list(stopped_ranks())
        self._stopped_s = self._stopped_s + gap_s if stopped else 0.0
        out, patience_s = self._out[0], self._patience_s(self._out[0])
        if self._silent_s <= patience_s and self._stopped_s < self._floor_s:
            return None
        which = f"; rank {', '.join(map(str, stopped))} was stopped by a signal" if stopped else ""
        usual_s = self._usual_s(out)
        usual = f"which takes {usual_s:.3g} s by running mean" if out.kind in self._seen else "the first of its kind"
        return (
            f"its ranks are stuck: {self._silent_s:.1f} s without an answer to a batch of {len(out.tick.rows)} rows, "
            f"{usual} (allowed: {patience_s:.1f} s){which}"
        )

    def _patience_s(self, out: _Out) -> float:
        usual_s = self._usual_s(out)
        allowed_s = self._factor * usual_s if out.kind in self._seen else self._ceiling_s
        # A tick that is known to take long is no hang, whatever the ceiling.
        return max(min(max(allowed_s, self._floor_s), self._ceiling_s), 2 * usual_s)

    def _usual_s(self, out: _Out) -> float:
        return max(out.expected_s, self._step_s.get(out.tick.batch_key, 0.0) * out.tick.num_steps)

    def _learn(self, out: _Out, duration_s: float) -> None:
        if len(self._seen) >= _MAX_KINDS:
            self._seen.clear()
            self._step_s.clear()
        key, step_s = out.tick.batch_key, duration_s / out.tick.num_steps
        # The first of a kind says nothing about the next ones.
        if out.kind in self._seen:
            known_s = self._step_s.get(key, step_s)
            self._step_s[key] = known_s + (_WEIGHT_SLOWER if step_s > known_s else _WEIGHT_FASTER) * (step_s - known_s)
        self._seen.add(out.kind)

    def _begin(self) -> None:
        """The tick at the head begins now."""
        self._silent_s = self._stopped_s = 0.0
        self._looked_s = self._clock()
