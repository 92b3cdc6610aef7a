"""Closed loop: clients that each wait for their picture before they ask for the next; pictures a second."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.report import Figure
from benchmarks.serving import limit
from benchmarks.serving.bench import MOST_CLIENTS, Bench, planned
from benchmarks.serving.load import closed_loop, steady_window
from benchmarks.serving.sides import Side
from benchmarks.serving.summary import ratio_figures, spread_figures
from benchmarks.serving.turns import take_turns

# At one client, over the better of those that draw one picture after the other.
_GOAL_ALONE = 0.95
_GOAL_OVER_MONOLITH = 2.2
_GOAL_OVER_LIMIT = 0.9


@dataclass(frozen=True, kw_only=True)
class ClosedLoopResult:
    """Pictures a second by number of clients, side and round."""

    rates: Mapping[int, Mapping[str, Sequence[float]]]
    batch_rates: Mapping[int, float] = field(default_factory=dict)
    """Those of the limit by batch size, when the best one was looked for."""


def measure(bench: Bench) -> ClosedLoopResult:
    """All numbers of clients; the limit takes its turns where there are most."""
    rates: dict[int, dict[str, list[float]]] = {}
    batch_size, batch_rates = (0, {}) if bench.limit is None else limit.find_best_batch_size(bench, bench.limit)
    for clients, num_pictures in bench.scale.pictures_by_clients.items():

        def play(name: str, _round: int, clients: int = clients, num_pictures: int = num_pictures) -> float:
            if name == "limit":
                assert bench.limit is not None
                return limit.pictures_per_s(bench, bench.limit, batch_size)
            return _turn(bench, name, clients, num_pictures)

        names = [*bench.names, *(["limit"] if bench.limit and clients == MOST_CLIENTS else [])]
        if not names:
            continue
        rates[clients] = take_turns(f"closed loop, {clients} clients", names, bench.scale.rounds, play)
    return ClosedLoopResult(rates=rates, batch_rates=batch_rates)


def _turn(bench: Bench, name: str, clients: int, num_pictures: int) -> float:
    async def load(side: Side) -> float:
        plan = map(planned, bench.pictures())
        sent = await closed_loop(side.ask, plan, clients=clients, num_answers=clients + num_pictures)
        begin_s, end_s = steady_window(sent, clients=clients, num_pictures=num_pictures)
        return num_pictures / (end_s - begin_s)

    return bench.take_turn(name, load)


def figures(result: ClosedLoopResult) -> list[Figure]:
    """The rates of all sides and our ratios to them."""
    made: list[Figure] = []
    for clients, rates in result.rates.items():
        title = f"closed loop, {clients} client{'s' if clients > 1 else ''}"
        for name, by_round in rates.items():
            made += spread_figures(f"{title}: {name}", by_round, "pictures/s")
        if "ours" in rates:
            made += _ratios(title, clients, rates)
    made += [
        Figure(name=f"limit, batch of {size}, when the best was looked for", value=rate, unit="pictures/s")
        for size, rate in result.batch_rates.items()
    ]
    return made


def _ratios(title: str, clients: int, rates: Mapping[str, Sequence[float]]) -> list[Figure]:
    ours = rates["ours"]
    goals: dict[str, float] = {}
    if clients == MOST_CLIENTS:
        goals = {"monolith": _GOAL_OVER_MONOLITH, "limit": _GOAL_OVER_LIMIT}
    one_by_one = [name for name in ("monolith", "fastapi") if name in rates]
    if clients == 1 and one_by_one:
        goals[max(one_by_one, key=lambda name: statistics.median(rates[name]))] = _GOAL_ALONE
    made = []
    for name in rates:
        if name != "ours":
            made += ratio_figures(f"{title}: ours over {name}", ours, rates[name], at_least=goals.get(name))
    return made
