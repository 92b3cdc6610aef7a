"""Where the processors' time goes when our server has as much to do as it can."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.report import Figure
from benchmarks.running import named_processes
from benchmarks.serving.bench import MOST_CLIENTS, Bench, planned
from benchmarks.serving.load import closed_loop, steady_window
from benchmarks.serving.metrics_page import fetch_metrics
from benchmarks.serving.sides import Ours, Side
from benchmarks.serving.summary import spread_figures
from benchmarks.serving.turns import take_turns

_GOAL_RANKS_PERCENT = 95.0
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class _Look:
    """One look at the counters, at a moment when the server had just published its own."""

    at_s: float
    tick_s: Mapping[str, float]
    """Seconds that the ranks of each stage have spent in ticks."""
    cpu_s: Mapping[str, float]
    """Processor seconds by process."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Shares of one turn, in percent."""

    ticks: Mapping[str, float]
    """Of the wall time times the replicas of denoising, by stage. The stages take turns on the cores of these replicas,
    so together they cannot be more than all of it."""
    cpu: Mapping[str, float]
    """Of all cores over the wall time, by what used them."""


def measure(bench: Bench) -> Sequence[Share]:
    """Our side alone, by round."""

    def play(name: str, _round: int) -> Share:
        return bench.take_turn(name, lambda side: _turn(bench, side))

    return take_turns("saturation", ["ours"], bench.scale.rounds, play)["ours"]


async def _turn(bench: Bench, side: Side) -> Share:
    assert isinstance(side, Ours)
    looks: list[_Look] = []
    stop = threading.Event()
    watching = asyncio.create_task(asyncio.to_thread(_watch, side, looks, stop))
    num_pictures = bench.scale.saturation_pictures
    try:
        plan = map(planned, bench.pictures())
        sent = await closed_loop(side.ask, plan, clients=MOST_CLIENTS, num_answers=MOST_CLIENTS + num_pictures)
    finally:
        stop.set()
        await watching
    begin_s, end_s = steady_window(sent, clients=MOST_CLIENTS, num_pictures=num_pictures)
    within = [look for look in looks if begin_s <= look.at_s <= end_s]
    if len(within) < 2:
        raise RuntimeError(f"{num_pictures} pictures are drawn too soon to see the metrics change; ask for more")
    return _share(within[0], within[-1], _num_replicas(side))


def _watch(side: Ours, looks: list[_Look], stop: threading.Event) -> None:
    """Look whenever the metrics change; in a thread, so that the load does not wait."""
    processes = named_processes(side.server) | {"load generator": psutil.Process()}
    last: float | None = None
    while not stop.is_set():
        seen = fetch_metrics(side.server.metrics_url)
        tick_s = {stage: value for (name, stage), value in seen.items() if name == "tick_seconds_total"}
        if last is not None and tick_s["denoising"] != last:
            looks.append(_Look(at_s=time.time(), tick_s=tick_s, cpu_s=_cpu_seconds(processes)))
        last = tick_s["denoising"]
        time.sleep(_POLL_S)


def _cpu_seconds(processes: Mapping[str, psutil.Process]) -> dict[str, float]:
    """By kind of process: ranks and stubs of each model under names of their own."""
    seconds: dict[str, float] = defaultdict(float)
    for name, process in processes.items():
        times = process.cpu_times()
        seconds[_kind(name)] += times.user + times.system
    machine = psutil.cpu_times()
    seconds["all processes of the machine"] = (
        machine.user + machine.system + machine.nice + machine.irq + machine.softirq
    )
    return seconds


def _kind(name: str) -> str:
    """All ranks of a model are one kind."""
    model, separator, rank = name.partition(", rank ")
    return f"{model}, ranks" if separator and rank else name


def _num_replicas(side: Ours) -> int:
    """Those of denoising: its first ranks."""
    return sum(name.startswith("denoising, rank ") and name.endswith(".0") for name in named_processes(side.server))


def _share(first: _Look, last: _Look, num_replicas: int) -> Share:
    wall_s = last.at_s - first.at_s
    cores = psutil.cpu_count() or 1
    percent_of_ticks, percent_of_cpu = 100 / (num_replicas * wall_s), 100 / (cores * wall_s)
    return Share(
        ticks={stage: percent_of_ticks * (last.tick_s[stage] - seconds) for stage, seconds in first.tick_s.items()},
        cpu={name: percent_of_cpu * (last.cpu_s[name] - seconds) for name, seconds in first.cpu_s.items()},
    )


def figures(shares: Sequence[Share]) -> list[Figure]:
    """What the ranks use, and a small profile of the rest."""
    title = f"saturation, {MOST_CLIENTS} clients"
    in_ticks = [sum(each.ticks.values()) for each in shares]
    ranks = [sum(value for name, value in each.cpu.items() if name.endswith(", ranks")) for each in shares]
    first, *rest = spread_figures(f"{title}: wall time that ranks are in a model", in_ticks, "%")
    made = [
        Figure(name=first.name, value=first.value, unit=first.unit, at_least=_GOAL_RANKS_PERCENT),
        *rest,
        *spread_figures(f"{title}: processor time of all ranks, of cores x wall", ranks, "%"),
    ]
    for stage in shares[0].ticks:
        mean = sum(each.ticks[stage] for each in shares) / len(shares)
        made.append(Figure(name=f"{title}: wall time in ticks of {stage}", value=mean, unit="%"))
    for name in shares[0].cpu:
        mean = sum(each.cpu[name] for each in shares) / len(shares)
        made.append(Figure(name=f"{title}: processor time, {name}", value=mean, unit="%"))
    return made
