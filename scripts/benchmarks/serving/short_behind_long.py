"""Short requests that arrive while long ones, sent before them, are being drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.report import Figure
from benchmarks.serving.bench import Bench
from benchmarks.serving.load import open_loop
from benchmarks.serving.schedule import Arrival, poisson_arrivals
from benchmarks.serving.sides import Side
from benchmarks.serving.summary import latency_figures, percentile
from benchmarks.serving.turns import take_turns

_GOAL_OVER_MONOLITH = 0.35
_NUM_LONGS = 8
_LONG_STEPS = 50
_SHORT_STEPS = 4
_SHORTS_PER_S = 5.0
_HEAD_START_S = 0.2
"""From the long requests to the first moment at which a short one may arrive."""

ShortLatencies = Mapping[str, Sequence[float]]
"""Seconds by side, of all rounds."""


def measure(bench: Bench) -> ShortLatencies:
    """The latencies of the short requests alone."""

    def play(name: str, index: int) -> list[float]:
        arrivals = _arrivals(bench.scale.num_shorts, seed=index)

        async def load(side: Side) -> list[float]:
            sent = await open_loop(side.ask, arrivals, bench.pictures(each.num_inference_steps for each in arrivals))
            return [each.latency_s for each in sent if each.request.num_inference_steps == _SHORT_STEPS]

        return bench.take_turn(name, load)

    turns = take_turns("short behind long", bench.names, bench.scale.rounds, play)
    return {name: [latency_s for turn in turns[name] for latency_s in turn] for name in turns}


def _arrivals(num_shorts: int, seed: int) -> list[Arrival]:
    longs = [Arrival(at_s=0.0, num_inference_steps=_LONG_STEPS)] * _NUM_LONGS
    steps = [_SHORT_STEPS] * num_shorts
    shorts = [
        Arrival(at_s=_HEAD_START_S + each.at_s, num_inference_steps=each.num_inference_steps)
        for each in poisson_arrivals(rate_per_s=_SHORTS_PER_S, num_inference_steps=steps, seed=seed)
    ]
    return [*longs, *shorts]


def figures(latencies_s: ShortLatencies) -> list[Figure]:
    """Latencies, and the ratio of the slowest to the monolith's."""
    title = f"{_SHORT_STEPS} steps behind {_NUM_LONGS} times {_LONG_STEPS}"
    made = [figure for name in latencies_s for figure in latency_figures(f"{title}: {name}", latencies_s[name])]
    for name in latencies_s if "ours" in latencies_s else ():
        if name != "ours":
            ratio = percentile(latencies_s["ours"], 99) / percentile(latencies_s[name], 99)
            goal = _GOAL_OVER_MONOLITH if name == "monolith" else None
            made.append(Figure(name=f"{title}: p99 of ours over {name}", value=ratio, at_most=goal))
    return made
