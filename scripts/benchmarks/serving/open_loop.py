"""Open loop: requests arrive at random, with steps from 4 to 50, whether those before are answered or not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import Figure
from benchmarks.serving.bench import Bench
from benchmarks.serving.load import Sent, open_loop
from benchmarks.serving.lone import FEWEST_STEPS, MOST_STEPS, LoneResult
from benchmarks.serving.schedule import even_mix, poisson_arrivals
from benchmarks.serving.sides import Side
from benchmarks.serving.summary import LoneLatency, latency_figures, spread_figures
from benchmarks.serving.turns import take_turns

LOAD = 0.8
_TOLERABLE = 3.0
"""A request that takes at most so many times its lone latency is well served."""
_GOAL_WELL_SERVED_PERCENT = 99.0


@dataclass(frozen=True, kw_only=True)
class OpenLoopResult:
    """What became of the same arrivals at every side."""

    load: float
    """Arrivals a second over the capacity of the reference side."""
    sent: Mapping[str, Sequence[Sequence[Sent]]]
    """By side and round."""

    def latencies_s(self, name: str) -> list[float]:
        """Those of all rounds."""
        return [sent.latency_s for turn in self.sent[name] for sent in turn]


def measure(bench: Bench, lone: LoneResult) -> OpenLoopResult:
    """The load for which there are goals."""
    return _measure(bench, lone, LOAD, duration_s=bench.scale.open_loop_s, rounds=bench.scale.rounds)


def measure_sweep(bench: Bench, lone: LoneResult) -> list[OpenLoopResult]:
    """Other loads, once each, for the plot."""
    return [_measure(bench, lone, load, duration_s=bench.scale.sweep_s, rounds=1) for load in bench.scale.sweep_loads]


def _measure(bench: Bench, lone: LoneResult, load: float, *, duration_s: float, rounds: int) -> OpenLoopResult:
    rate_per_s = load * lone.capacity_per_s
    count = max(2, round(rate_per_s * duration_s))

    def play(name: str, index: int) -> list[Sent]:
        steps = even_mix(FEWEST_STEPS, MOST_STEPS, count, seed=index)
        arrivals = poisson_arrivals(rate_per_s=rate_per_s, num_inference_steps=steps, seed=index)

        async def send(side: Side) -> list[Sent]:
            return await open_loop(side.ask, arrivals, bench.pictures(steps))

        return bench.take_turn(name, send)

    sent = take_turns(f"random arrivals, load {load:g}", bench.names, rounds, play)
    return OpenLoopResult(load=load, sent=sent)


def figures(result: OpenLoopResult, lone: LoneResult) -> list[Figure]:
    """Latencies, and how many requests were well served."""
    title = f"random arrivals, {100 * result.load:g} % of {lone.reference}'s capacity"
    made = []
    for name, turns in result.sent.items():
        by_round = [_well_served_percent(turn, lone.lone_latency(name)) for turn in turns]
        # Every round has as many requests, so that the mean is the share of all.
        share = Figure(
            name=f"{title}: {name}: within {_TOLERABLE:g} times the lone latency",
            value=statistics.mean(by_round),
            unit="%",
            at_least=_GOAL_WELL_SERVED_PERCENT if name == "ours" else None,
        )
        medians_ms = [1000 * statistics.median(sent.latency_s for sent in turn) for turn in turns]
        made += [
            *latency_figures(f"{title}: {name}", result.latencies_s(name)),
            *spread_figures(f"{title}: {name}: median latency of a round", medians_ms, "ms")[1:],
            share,
            Figure(name=f"{share.name}: lowest round", value=min(by_round), unit="%"),
        ]
    return made


def sweep_figures(result: OpenLoopResult, lone: LoneResult) -> list[Figure]:
    """The latencies that the plot shows."""
    title = f"sweep, random arrivals, {100 * result.load:g} % of {lone.reference}'s capacity"
    return [figure for name in result.sent for figure in latency_figures(f"{title}: {name}", result.latencies_s(name))]


def _well_served_percent(sent: Sequence[Sent], lone: LoneLatency) -> float:
    well = sum(each.latency_s <= _TOLERABLE * lone.at(each.request.num_inference_steps) for each in sent)
    return 100 * well / len(sent)
