"""Results as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulation.simulator import Ended, Result
from simulation.workload import Workload


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """Requests that are reported together."""

    group: str
    requests: int
    slo_percent: float | None
    """Share that was done within so many lone latencies, of those that were not cancelled; None where all were."""
    latency_p50_s: float | None
    latency_p99_s: float | None
    slowdown_p50: float | None
    """Latency over lone latency."""
    slowdown_p99: float | None
    refused: int
    dropped: int
    cancelled: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One simulation."""

    policy: str
    replicas: int
    load: float
    groups: tuple[GroupSummary, ...]
    """All requests first."""
    requests_per_s: float
    """That were done, in simulated time."""
    busy_percent: float
    """Of the time of all replicas, from the first arrival to the last end."""
    batch_rows: float
    """In a tick, in the mean."""
    ticks: int
    wasted_steps_percent: float
    """Of all steps, those of requests that were cancelled or dropped."""
    wall_s: float
    simulated_requests_per_s: float


def summarise(
    result: Result, workload: Workload, *, policy: str, num_replicas: int, load: float, slo_factor: float
) -> Summary:
    """The numbers of one simulation."""
    groups = np.array([kind.group for kind in workload.kinds])[result.kind]
    masks = {"all": np.ones(len(groups), dtype=bool)}
    names = dict.fromkeys(kind.group for kind in workload.kinds)
    if len(names) > 1:
        masks |= {name: groups == name for name in names}
    if len({*workload.priorities}) > 1:
        masks |= {f"priority {each}": result.priority == each for each in sorted({*workload.priorities}, reverse=True)}
    done = int((result.ended == Ended.DONE).sum())
    return Summary(
        policy=policy,
        replicas=num_replicas,
        load=load,
        groups=tuple(_summarise_group(name, result, mask, slo_factor) for name, mask in masks.items()),
        requests_per_s=done / result.duration_s,
        busy_percent=100 * result.busy_s / (result.duration_s * num_replicas),
        batch_rows=result.batch_rows / max(1, result.num_ticks),
        ticks=result.num_ticks,
        wasted_steps_percent=100 * result.steps_wasted / max(1, result.steps_run),
        wall_s=result.wall_s,
        simulated_requests_per_s=len(groups) / result.wall_s,
    )


def _summarise_group(name: str, result: Result, mask: NDArray[np.bool_], slo_factor: float) -> GroupSummary:
    ended = result.ended[mask]
    done = ended == Ended.DONE
    counted = int((ended != Ended.CANCELLED).sum())
    latency_s = result.latency_s[mask][done]
    slowdown = latency_s / result.lone_s[mask][done]
    return GroupSummary(
        group=name,
        requests=len(ended),
        slo_percent=100 * float((slowdown <= slo_factor).sum()) / counted if counted else None,
        latency_p50_s=_percentile(latency_s, 50),
        latency_p99_s=_percentile(latency_s, 99),
        slowdown_p50=_percentile(slowdown, 50),
        slowdown_p99=_percentile(slowdown, 99),
        refused=int((ended == Ended.REFUSED).sum()),
        dropped=int((ended == Ended.DROPPED).sum()),
        cancelled=int((ended == Ended.CANCELLED).sum()),
    )


def _percentile(values: NDArray[np.float64], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if len(values) else None


def format_groups(summaries: Sequence[Summary], slo_factor: float) -> str:
    """How requests fared: a line for each simulation and group."""
    heads = ["latency p50", "p99", "slowdown p50", "p99", "refused", "dropped", "cancelled"]
    rows = [["replicas", "policy", "requests", "", f"within {slo_factor:g}x", *heads]]
    rows += [[str(each.replicas), each.policy, *_group_cells(group)] for each in summaries for group in each.groups]
    return _table(rows, num_texts=3)


def _group_cells(group: GroupSummary) -> list[str]:
    return [
        group.group,
        str(group.requests),
        "-" if group.slo_percent is None else f"{group.slo_percent:.2f} %",
        _digits(group.latency_p50_s, " s"),
        _digits(group.latency_p99_s, " s"),
        _digits(group.slowdown_p50),
        _digits(group.slowdown_p99),
        str(group.refused),
        str(group.dropped),
        str(group.cancelled),
    ]


def format_runs(summaries: Sequence[Summary]) -> str:
    """How replicas fared, and what the simulation took: a line for each."""
    heads = ["requests/s", "busy", "rows a batch", "ticks", "wasted steps", "simulated in", "per s"]
    return _table([["replicas", "policy", *heads], *map(_run_cells, summaries)], num_texts=2)


def _run_cells(summary: Summary) -> list[str]:
    return [
        str(summary.replicas),
        summary.policy,
        _digits(summary.requests_per_s),
        f"{summary.busy_percent:.1f} %",
        f"{summary.batch_rows:.2f}",
        str(summary.ticks),
        f"{summary.wasted_steps_percent:.1f} %",
        f"{summary.wall_s:.1f} s",
        f"{summary.simulated_requests_per_s:.0f}",
    ]


def to_json(summaries: Sequence[Summary], settings: dict[str, Any]) -> dict[str, Any]:
    """Plain values."""
    return {"settings": settings, "simulations": [asdict(each) for each in summaries]}


def _table(rows: Sequence[Sequence[str]], *, num_texts: int) -> str:
    """Columns of equal width; the first few are texts, the others numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < num_texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _digits(value: float | None, unit: str = "") -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    return (f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}") + unit
