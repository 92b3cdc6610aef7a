"""The load, the faults and the looks at the server, all at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.ranks import Fault, Injector
from benchmarks.serving.load import Sent, closed_loop, counted
from benchmarks.soak.growth import WARM_UP
from benchmarks.soak.mixed import MixedCaller, mixed_plan
from benchmarks.soak.resources import Snapshot, watch
from triton_diffusion.server import TritonServer
from triton_diffusion_client import AsyncDiffusionClient


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What was seen."""

    caller: MixedCaller
    sent: Sequence[Sent]
    faults: Sequence[Fault]
    snapshots: Sequence[Snapshot]

    @property
    def num_cancelled(self) -> int:
        """Requests that their caller gave up."""
        return sum(each.cancelled for each in self.sent)


async def soak(
    server: TritonServer,
    temporary_folder: Path,
    *,
    clients: int,
    duration_s: float,
    fault_every_s: float,
    look_every_s: float,
    seed: int,
    max_sequence_length: int,
) -> Soak:
    """Ranks are killed, never stopped: a stopped one is slow to be noticed, and no other for its resources.

    Twice as many clients while it warms up: stacks of threads, malloc's arenas and the pages of shared memory grow to
    what the most requests at a time have needed, and stay there. By chance alone that would take hours.
    """
    injector = Injector(server.pid, seed=seed, kinds=["kill"])
    snapshots: list[Snapshot] = []
    begin_s = time.time()
    warm_s, end_s = begin_s + WARM_UP * duration_s, begin_s + duration_s
    async with (
        AsyncDiffusionClient(server.grpc_address) as grpc,
        AsyncDiffusionClient(server.http_address, "http") as http,
    ):
        caller = MixedCaller({"grpc": grpc, "http": http})
        disturbing = asyncio.create_task(injector.run(every_s=fault_every_s, until_s=end_s))
        watching = asyncio.create_task(watch(server, temporary_folder, snapshots, every_s=look_every_s))
        try:
            plan = mixed_plan(seed, max_sequence_length, lambda: time.time() < warm_s)
            plan = counted(plan, "soak, warm-up", warm_s - begin_s)
            sent = await closed_loop(caller.ask, plan, clients=2 * clients, check=_take_any)
            plan = mixed_plan(seed + 1, max_sequence_length, lambda: time.time() < end_s)
            plan = counted(plan, "soak", end_s - warm_s)
            sent += await closed_loop(caller.ask, plan, clients=clients, check=_take_any)
            await disturbing
        finally:
            for task in (disturbing, watching):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
    return Soak(caller=caller, sent=sent, faults=injector.faults, snapshots=snapshots)


def _take_any(_answer: bytes) -> None:
    """The caller has looked at it."""
