"""Whether our processes grow: many short requests, a third of them cancelled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tqdm import tqdm

from benchmarks.report import Figure
from benchmarks.running import named_processes
from benchmarks.serving.bench import MOST_CLIENTS, Bench
from benchmarks.serving.cancel_storm import cancelling_plan
from benchmarks.serving.load import Planned, Sent, closed_loop
from benchmarks.serving.sides import Side, open_ours
from triton_diffusion.server import TritonServer

_GOAL_GROWTH_PERCENT = 2.0
_MIB = 2**20
_PARTS = 10
_MIN_WARM_UP_REQUESTS = 200
# So small that the warm-up fills it: the default takes tens of thousands of prompts until it drops the first.
_SETTINGS = {"text_encoding.prompt_cache_bytes": str(_MIB)}


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Resident bytes by process."""

    num_requests: int
    num_cancelled: int
    num_warm_up: int
    when_ready: Mapping[str, int]
    """Before the first request."""
    resident: list[Mapping[str, int]]
    """After the requests that do not count, and after each tenth of those that do, with none under way."""


def measure(bench: Bench, settings: Mapping[str, str], num_requests: int) -> MemoryResult:
    """Send the requests to a server of their own.

    As many as a tenth of them come before and do not count: until then the heaps of the ranks grow to the most that
    batches of any composition need.
    """
    num_warm_up = max(_MIN_WARM_UP_REQUESTS, num_requests // _PARTS)
    with open_ours({**settings, **_SETTINGS}, bench.runner) as ours:
        when_ready = _resident_bytes(ours.server)
        resident: list[Mapping[str, int]] = []
        counted: list[Sent] = []
        plan = _plan(bench, num_warm_up + num_requests)

        async def load(side: Side) -> None:
            progress = iter(tqdm(plan, total=num_warm_up + num_requests, desc="memory", unit="request"))
            await closed_loop(side.ask, itertools.islice(progress, num_warm_up), clients=MOST_CLIENTS)
            resident.append(_resident_bytes(ours.server))
            for part in range(_PARTS):
                size = num_requests * (part + 1) // _PARTS - num_requests * part // _PARTS
                counted.extend(await closed_loop(side.ask, itertools.islice(progress, size), clients=MOST_CLIENTS))
                resident.append(_resident_bytes(ours.server))

        dataclasses.replace(bench, sides={"ours": ours}).take_turn("ours", load)
    return MemoryResult(
        num_requests=len(counted),
        num_cancelled=sum(each.cancelled for each in counted),
        num_warm_up=num_warm_up,
        when_ready=when_ready,
        resident=resident,
    )


def _resident_bytes(server: TritonServer) -> dict[str, int]:
    """Of every process of the server; what processes share counts in each of them."""
    return {name: process.memory_info().rss for name, process in named_processes(server).items()}


def _plan(bench: Bench, num_requests: int) -> Iterator[Planned]:
    """One or two steps each; the moments of the cancels lie within what such a request takes under this load."""
    steps = itertools.islice(itertools.cycle((1, 2)), num_requests)
    # Only the step counts differ from those of the storm, whose cancelled requests the log shall tell apart.
    for planned in cancelling_plan(bench.pictures(steps), within_s=0.5, seed=num_requests):
        short = dataclasses.replace(planned.request, num_inference_steps=1 + planned.request.seed % 2)
        yield dataclasses.replace(planned, request=short)


def figures(result: MemoryResult) -> list[Figure]:
    """Every process when ready, before and after; all together after each tenth; the growth."""
    title = (
        f"memory, {result.num_requests} requests, {result.num_cancelled} cancelled, after {result.num_warm_up} others"
    )
    moments = {"when ready": result.when_ready, "before": result.resident[0], "after": result.resident[-1]}
    made = [
        Figure(name=f"{title}: {moment}: {name}", value=_mib(size_bytes), unit="MiB")
        for moment, resident in moments.items()
        for name, size_bytes in resident.items()
    ]
    sums = [sum(resident.values()) for resident in (result.when_ready, *result.resident)]
    names = ["when ready", "before", *(f"after {100 * (part + 1) // _PARTS} %" for part in range(_PARTS))]
    made += [
        Figure(name=f"{title}: all, {name}", value=_mib(total), unit="MiB")
        for name, total in zip(names, sums, strict=True)
    ]
    growth_percent = 100 * (sums[-1] - sums[1]) / sums[1]
    return [
        *made,
        Figure(name=f"{title}: growth of all", value=growth_percent, unit="%", at_most=_GOAL_GROWTH_PERCENT),
    ]


def _mib(size_bytes: int) -> float:
    return round(size_bytes / _MIB, 1)
