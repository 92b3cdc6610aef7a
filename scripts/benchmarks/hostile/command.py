"""Flags, the server, and what is looked at before and after."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import psutil
from google.protobuf import text_format
from tqdm import tqdm
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from benchmarks.hostile.cases import NUM_CLIENTS
from benchmarks.hostile.files import LARGEST_BYTES
from benchmarks.hostile.wire import Connection
from benchmarks.report import Figure, Report, describe_machine
from benchmarks.running import named_processes, running_server, shared_memory_segments
from triton_diffusion.repository import find_model_repository
from triton_diffusion.server import TritonServer

if TYPE_CHECKING:
    from benchmarks.hostile.attack import Outcome

_MIB = 1 << 20
_GROWTH_SHARE, _GROWTH_BYTES = 1.05, 16 * _MIB
_HOLD_REQUESTS = ("tritonserver", "diffusion, stub")
"""These may keep as much as all requests have that are in work at a time: allocators give back little."""
_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--requests", type=int, default=20_000, metavar="N", help="requests to send (default: %(default)s)")
    add("--seed", type=int, default=0, help="another one makes other requests (default: %(default)s)")


def measure(args: argparse.Namespace) -> Report:
    """Start a server, attack it, and compare its processes with those before."""
    # Needs hypothesis, which the other benchmarks do without.
    from benchmarks.hostile.attack import attack, make_cases

    cases = make_cases(args.requests, args.seed, input_types())
    with running_server({"model_path": args.model_path, "dtype": "float32", "spare_ranks": "false"}) as server:
        watch = _Watch(server)
        with tqdm(total=len(cases), unit=" requests", file=sys.stderr) as bar:

            def connect() -> Connection:
                return Connection(server.http_address, server.grpc_address, server.pid)

            def between(done: int) -> None:
                bar.update(done - bar.n)
                # The first fifth is warm-up: caches fill, and every kind of request has been seen.
                if not watch.before and done >= len(cases) / 5:
                    watch.before = watch.resident_bytes()

            started_s = time.monotonic()
            outcome = attack(cases, connect, between=between)
            took_s = time.monotonic() - started_s
        figures = [*_answers(outcome), *watch.figures()]
    for violation in outcome.violations[:_SHOWN]:
        print(f"violation: {violation}", file=sys.stderr)
    figures += [
        Figure(name="requests a second", value=len(cases) / took_s, unit="1/s"),
        Figure(name="answers that were not allowed, or none", value=len(outcome.violations), at_most=0),
    ]
    machine = describe_machine(dtype="float32", num_threads=len(os.sched_getaffinity(0)))
    return Report(machine=machine, figures=figures, must_hold=True)


def input_types() -> dict[str, str]:
    """The datatypes of the chain's inputs by name, from its config.pbtxt."""
    config = text_format.Parse(
        (find_model_repository() / "diffusion_stream" / "config.pbtxt").read_text(), ModelConfig()
    )
    names = {each.name: DataType.Name(each.data_type).removeprefix("TYPE_") for each in config.input}
    return {name: "BYTES" if kind == "STRING" else kind for name, kind in names.items()}


def _answers(outcome: Outcome) -> list[Figure]:
    return [Figure(name=f"{kind}: {answer}", value=count) for (kind, answer), count in sorted(outcome.answers.items())]


class _Watch:
    """The processes of a server, and what they take."""

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self._pids = self._processes()
        self.before: Mapping[str, int] = {}
        """Resident bytes by name, after the warm-up."""

    def _processes(self) -> dict[str, int]:
        return {name: process.pid for name, process in named_processes(self._server).items()}

    def resident_bytes(self) -> dict[str, int]:
        """By name of the process."""
        gc.collect()
        return {name: psutil.Process(pid).memory_info().rss for name, pid in self._processes().items()}

    def figures(self) -> list[Figure]:
        """How many processes were replaced, and how far each has grown since the warm-up."""
        replaced = len(set(self._pids.items()) ^ set(self._processes().items()))
        after = self.resident_bytes()
        figures = [Figure(name="processes that ended or were replaced", value=replaced, at_most=0)]
        for name, size in sorted(after.items()):
            before = self.before.get(name, size)
            kept = NUM_CLIENTS * LARGEST_BYTES if name in _HOLD_REQUESTS else _GROWTH_BYTES
            figures.append(
                Figure(
                    name=f"memory of {name}, {before / _MIB:.0f} MiB before",
                    value=size / _MIB,
                    unit="MiB",
                    at_most=max(_GROWTH_SHARE * before, before + kept) / _MIB,
                )
            )
        segments = sum(size for _, size in shared_memory_segments())
        return [*figures, Figure(name="/dev/shm", value=segments / _MIB, unit="MiB")]
