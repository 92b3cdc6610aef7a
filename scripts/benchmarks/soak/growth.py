"""Whether a measure is higher at the end than behind the warm-up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import Figure
from benchmarks.soak.resources import MEMORY, Snapshot

GOAL_PERCENT = 2.0
WARM_UP = 0.25
"""Share of the time, after which a measure counts."""
_WINDOW = 0.2
_MIB = 2**20
# A process of 20 MiB grows by more than 2 % when it takes one more arena.
_SLACK_BYTES = 2**20
# A connection or a pool's thread more or less is none of those that leak, for these go on growing.
_SLACK_COUNT = 3


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One measure of one process."""

    name: str
    measure: str
    before: float
    """Behind the warm-up; bytes or a count."""
    after: float
    """At the end."""

    @property
    def percent(self) -> float:
        """From before to after."""
        return 100 * (self.after - self.before) / self.before if self.before else 100 * self.after

    def allowed_percent(self, goal_percent: float = GOAL_PERCENT) -> float:
        """The goal; for something small, more."""
        slack = _SLACK_BYTES if self.measure in MEMORY else _SLACK_COUNT
        return max(goal_percent, 100 * slack / self.before if self.before else 100 * slack)

    def figure(self) -> Figure:
        """As a line of the table."""
        if self.measure in MEMORY:
            values = f"{self.before / _MIB:.1f} to {self.after / _MIB:.1f} MiB"
        else:
            values = f"{self.before:g} to {self.after:g}"
        return Figure(
            name=f"{self.name}: {self.measure}, {values}",
            value=self.percent,
            unit="%",
            at_most=self.allowed_percent(),
        )


def growths(snapshots: Sequence[Snapshot]) -> list[Growth]:
    """Of all that was there both behind the warm-up and at the end; medians, for single looks are noisy."""
    begin_s, duration_s = snapshots[0].at_s, snapshots[-1].at_s - snapshots[0].at_s
    before = _medians(snapshots, begin_s + WARM_UP * duration_s, begin_s + (WARM_UP + _WINDOW) * duration_s)
    after = _medians(snapshots, begin_s + (1 - _WINDOW) * duration_s, snapshots[-1].at_s)
    return [
        Growth(name=name, measure=measure, before=value, after=after[name, measure])
        for (name, measure), value in sorted(before.items())
        if (name, measure) in after
    ]


def _medians(snapshots: Sequence[Snapshot], begin_s: float, end_s: float) -> dict[tuple[str, str], float]:
    within = [snapshot.values for snapshot in snapshots if begin_s <= snapshot.at_s <= end_s]
    keys = {key for values in within for key in values}
    return {key: statistics.median(values[key] for values in within if key in values) for key in keys}
