"""What a server takes of the machine, at one moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.running import named_processes, shared_memory_segments
from triton_diffusion.server import TritonServer

MEMORY = ("RSS", "PSS", "/dev/shm")
"""Measures in bytes; the others are counts."""
WHOLE_SERVER = "server"
# A rank that loads is no measure for the one that it replaces; on a busy machine that takes half a minute.
_LOADS_FOR_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One look."""

    at_s: float
    """Seconds since the epoch."""
    values: Mapping[tuple[str, str], int]
    """By what a process is for (a restarted one has the name of the one before), or the whole server, and measure."""


def take_snapshot(server: TritonServer, temporary_folder: Path) -> Snapshot:
    """Look at all processes; one that has just been started, or ends meanwhile, is left out."""
    values: dict[tuple[str, str], int] = {}
    for name, process in named_processes(server).items():
        with contextlib.suppress(psutil.NoSuchProcess):
            if time.time() - process.create_time() > _LOADS_FOR_S:
                values.update({(name, measure): value for measure, value in _measure(process).items()})
    segments = shared_memory_segments()
    values[WHOLE_SERVER, "/dev/shm"] = sum(size_bytes for _, size_bytes in segments)
    values[WHOLE_SERVER, "files in /dev/shm"] = len(segments)
    values[WHOLE_SERVER, "temporary files"] = sum(len(names) for _, *two in os.walk(temporary_folder) for names in two)
    return Snapshot(at_s=time.time(), values=values)


def _measure(process: psutil.Process) -> dict[str, int]:
    memory = process.memory_full_info()
    return {
        "RSS": memory.rss,
        "PSS": memory.pss,
        "file descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


async def watch(server: TritonServer, temporary_folder: Path, snapshots: list[Snapshot], *, every_s: float) -> None:
    """Take snapshots until cancelled."""
    while True:
        snapshots.append(await asyncio.to_thread(take_snapshot, server, temporary_folder))
        await asyncio.sleep(every_s)
