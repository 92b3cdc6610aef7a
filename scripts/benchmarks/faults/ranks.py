"""The rank processes of a server, and what is done to them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil

from benchmarks.running import rank_arguments

KINDS = ("kill", "stop")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_LOOK_AGAIN_S = 0.5


class Rank(NamedTuple):
    """A rank by its place, which those that replace it have, too."""

    stage: str
    replica: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What was done to a rank."""

    at_s: float
    """Seconds since the epoch, as in the server's log."""
    rank: Rank
    kind: str
    """One of KINDS."""


def find_ranks(server_pid: int) -> dict[Rank, psutil.Process]:
    """Those that run now; a stopped one does not."""
    found = {}
    for process in psutil.Process(server_pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            place = rank_arguments(process)
            if place is not None and process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                found[Rank(*place)] = process
    return found


class Injector:
    """Harms ranks, chosen by a seed: a stage, one of its ranks, and what happens to it."""

    def __init__(self, server_pid: int, *, seed: int, kinds: Sequence[str] = KINDS) -> None:
        self._server_pid = server_pid
        self._kinds = kinds
        self._random = random.Random(seed)
        self._stages = sorted({rank.stage for rank in find_ranks(server_pid)})
        self.faults: list[Fault] = []
        """All so far."""

    async def run(self, *, every_s: float, until_s: float) -> None:
        """A fault every `every_s` seconds, the first after as many, until `until_s` (since the epoch)."""
        at_s = time.time() + every_s
        while at_s < until_s:
            await asyncio.sleep(at_s - time.time())
            while not await asyncio.to_thread(self.strike):
                await asyncio.sleep(_LOOK_AGAIN_S)
            at_s += every_s

    def strike(self) -> bool:
        """Harm one rank now; False where the stage that was chosen has none that runs."""
        stage, kind = self._random.choice(self._stages), self._random.choice(self._kinds)
        ranks = find_ranks(self._server_pid)
        of_stage = sorted(rank for rank in ranks if rank.stage == stage)
        if not of_stage:
            return False
        rank = self._random.choice(of_stage)
        fault = Fault(at_s=time.time(), rank=rank, kind=kind)
        try:
            ranks[rank].send_signal(_SIGNALS[kind])
        except psutil.NoSuchProcess:
            return False
        self.faults.append(fault)
        return True
