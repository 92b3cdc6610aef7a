"""Many measured values to few."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.report import Figure


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, between two of them by interpolation."""
    return float(np.percentile(values, percent))


class LoneLatency:
    """The latency of a request that has a side to itself, by its number of steps."""

    def __init__(self, measured_s: Mapping[int, float]) -> None:
        """`measured_s`: seconds at some numbers of steps; between them the latency grows evenly."""
        self._steps = sorted(measured_s)
        self._seconds = [measured_s[steps] for steps in self._steps]

    def at(self, num_inference_steps: int) -> float:
        """Seconds; outside the measured numbers of steps as at the nearest one."""
        return float(np.interp(num_inference_steps, self._steps, self._seconds))


def spread_figures(name: str, by_round: Sequence[float], unit: str = "") -> list[Figure]:
    """The median of the rounds, and how far they lie apart."""
    return [
        Figure(name=name, value=statistics.median(by_round), unit=unit),
        Figure(name=f"{name}: lowest round", value=min(by_round), unit=unit),
        Figure(name=f"{name}: highest round", value=max(by_round), unit=unit),
    ]


def ratio_figures(
    name: str, ours: Sequence[float], theirs: Sequence[float], *, at_least: float | None = None
) -> list[Figure]:
    """The ratio of the medians, with its goal, and the ratios of the single rounds."""
    by_round = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return [
        Figure(name=name, value=statistics.median(ours) / statistics.median(theirs), at_least=at_least),
        Figure(name=f"{name}: lowest round", value=min(by_round)),
        Figure(name=f"{name}: highest round", value=max(by_round)),
    ]


def latency_figures(name: str, latencies_s: Sequence[float]) -> list[Figure]:
    """Median and 99th percentile in milliseconds."""
    return [
        Figure(name=f"{name}: latency, p{percent}", value=1000 * percentile(latencies_s, percent), unit="ms")
        for percent in (50, 99)
    ]
