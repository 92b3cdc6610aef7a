"""What a side does without competition: the latency of a lone request, and how many it can take."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

from benchmarks.report import Figure
from benchmarks.serving.bench import Bench, planned
from benchmarks.serving.load import closed_loop, steady_window
from benchmarks.serving.schedule import even_mix
from benchmarks.serving.sides import Side
from benchmarks.serving.summary import LoneLatency
from benchmarks.serving.turns import take_turns

FEWEST_STEPS, MOST_STEPS = 4, 50
_STEP_COUNTS = (FEWEST_STEPS, 20, MOST_STEPS)
# Enough to keep a side that draws one picture after the other at work.
_CLIENTS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoneResult:
    """What the loads of the open loop are measured by."""

    latency_s: Mapping[str, Mapping[int, float]]
    """By side and number of steps."""
    reference: str
    """The side whose capacity counts as load 1."""
    capacity_per_s: float
    """Requests of mixed step counts that it answers."""

    def lone_latency(self, name: str) -> LoneLatency:
        """That of one side, for any number of steps."""
        return LoneLatency(self.latency_s[name])


def measure(bench: Bench) -> LoneResult:
    """One picture at a time, and then the capacity of the monolith, or of the first side if that takes no part."""
    turns = take_turns("lone requests", bench.names, bench.scale.rounds, lambda name, _round: _lone_turn(bench, name))
    latency_s = {
        name: {steps: statistics.median(s for turn in turns[name] for s in turn[steps]) for steps in _STEP_COUNTS}
        for name in bench.names
    }
    reference = "monolith" if "monolith" in bench.sides else bench.names[0]
    capacities = take_turns("capacity", [reference], bench.scale.rounds, lambda name, _round: _capacity(bench, name))
    capacity_per_s = statistics.median(capacities[reference])
    return LoneResult(latency_s=latency_s, reference=reference, capacity_per_s=capacity_per_s)


def _lone_turn(bench: Bench, name: str) -> dict[int, list[float]]:
    async def load(side: Side) -> dict[int, list[float]]:
        latencies_s: dict[int, list[float]] = {}
        for steps in _STEP_COUNTS:
            plan = map(planned, bench.pictures([steps] * bench.scale.lone_repeats))
            latencies_s[steps] = [sent.latency_s for sent in await closed_loop(side.ask, plan, clients=1)]
        return latencies_s

    return bench.take_turn(name, load)


def _capacity(bench: Bench, name: str) -> float:
    count = bench.scale.capacity_pictures
    # Before and after the window every client has another one under way.
    steps = [*even_mix(FEWEST_STEPS, MOST_STEPS, count, seed=0), *even_mix(FEWEST_STEPS, MOST_STEPS, _CLIENTS, seed=1)]

    async def load(side: Side) -> float:
        plan = map(planned, bench.pictures([*steps[-_CLIENTS:], *steps]))
        sent = await closed_loop(side.ask, plan, clients=_CLIENTS)
        begin_s, end_s = steady_window(sent, clients=_CLIENTS, num_pictures=count)
        return count / (end_s - begin_s)

    return bench.take_turn(name, load)


def figures(result: LoneResult) -> list[Figure]:
    """The latencies and the capacity."""
    made = [
        Figure(name=f"lone request, {steps} steps: {name}", value=1000 * seconds, unit="ms")
        for name, latencies_s in result.latency_s.items()
        for steps, seconds in latencies_s.items()
    ]
    name = f"capacity of {result.reference}, {FEWEST_STEPS} to {MOST_STEPS} steps"
    return [*made, Figure(name=name, value=result.capacity_per_s, unit="pictures/s")]
