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
from benchmarks.serving.load import Planned, closed_loop
from benchmarks.serving.sides import Ours, Side
from triton_diffusion.server import TritonServer

_GOAL_GROWTH_PERCENT = 2.0
_MIB = 2**20
_WARM_UP_REQUESTS = 64


@dataclass(frozen=True, kw_only=True)
class MemoryResult:
    """Resident bytes by process."""

    num_requests: int
    num_cancelled: int
    when_ready: Mapping[str, int]
    """Before the first request."""
    before: Mapping[str, int]
    """Before the requests that are counted here, when the server had drawn pictures with all clients."""
    after: Mapping[str, int]


def resident_bytes(server: TritonServer) -> dict[str, int]:
    """Of every process of the server; what processes share counts in each of them."""
    return {name: process.memory_info().rss for name, process in named_processes(server).items()}


def measure(bench: Bench, num_requests: int, when_ready: Mapping[str, int]) -> MemoryResult:
    """Send the requests to our side."""

    async def load(side: Side) -> MemoryResult:
        assert isinstance(side, Ours)
        await closed_loop(side.ask, _plan(bench, _WARM_UP_REQUESTS), clients=MOST_CLIENTS)
        before = resident_bytes(side.server)
        plan = iter(tqdm(_plan(bench, num_requests), total=num_requests, desc="memory", unit="request"))
        sent = await closed_loop(side.ask, plan, clients=MOST_CLIENTS)
        return MemoryResult(
            num_requests=len(sent),
            num_cancelled=sum(each.cancelled for each in sent),
            when_ready=when_ready,
            before=before,
            after=resident_bytes(side.server),
        )

    return bench.take_turn("ours", load)


def _plan(bench: Bench, num_requests: int) -> Iterator[Planned]:
    """One or two steps each; the moments of the cancels lie within what such a request takes under this load."""
    steps = itertools.islice(itertools.cycle((1, 2)), num_requests)
    # Only the step counts differ from those of the storm, whose cancelled requests the log shall tell apart.
    for planned in cancelling_plan(bench.pictures(steps), within_s=0.5, seed=num_requests):
        short = dataclasses.replace(planned.request, num_inference_steps=1 + planned.request.seed % 2)
        yield dataclasses.replace(planned, request=short)


def figures(result: MemoryResult) -> list[Figure]:
    """Every process at all three moments, and the growth."""
    title = f"memory, {result.num_requests} requests, {result.num_cancelled} cancelled"
    made = []
    moments = {"when ready": result.when_ready, "before": result.before, "after": result.after}
    for moment, resident in moments.items():
        for name, size_bytes in {**resident, "all": sum(resident.values())}.items():
            made.append(Figure(name=f"{title}: {moment}: {name}", value=round(size_bytes / _MIB, 1), unit="MiB"))
    before, after = sum(result.before.values()), sum(result.after.values())
    growth_percent = 100 * (after - before) / before
    return [
        *made,
        Figure(name=f"{title}: growth of all", value=growth_percent, unit="%", at_most=_GOAL_GROWTH_PERCENT),
    ]
