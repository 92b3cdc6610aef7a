"""Flags, and the figures."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from benchmarks.faults.command import SETTINGS, STAGES
from benchmarks.picture import absolute_model_path, default_sequence_length
from benchmarks.report import Figure, Report, describe_machine
from benchmarks.running import running_server
from benchmarks.soak.growth import growths
from benchmarks.soak.trial import Soak, soak
from benchmarks.variables import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--minutes", type=float, default=20.0, help="(default: %(default)s)")
    add("--fault-every", type=float, default=60.0, metavar="SECONDS", help="a rank is killed (default: %(default)s)")
    add("--look-every", type=float, default=5.0, metavar="SECONDS", help="at the processes (default: %(default)s)")
    add("--seed", type=int, default=0, help="of requests and faults (default: %(default)s)")
    add("--clients", type=int, default=8, help="(default: %(default)s)")


def measure(args: argparse.Namespace) -> Report:
    """One server for the whole time."""
    model_path = absolute_model_path(args.model_path)
    # What the server leaves in a temporary folder lies in ours, and nothing else does.
    with (
        tempfile.TemporaryDirectory(prefix="triton-diffusion-soak-") as folder,
        environment({"TMPDIR": folder}),
        running_server({"model_path": model_path, **SETTINGS}, stages=STAGES) as server,
    ):
        seen = asyncio.run(
            soak(
                server,
                Path(folder),
                clients=args.clients,
                duration_s=60 * args.minutes,
                fault_every_s=args.fault_every,
                look_every_s=args.look_every,
                seed=args.seed,
                max_sequence_length=default_sequence_length(model_path),
            )
        )
    for message, count in seen.caller.errors.most_common(10):
        print(f"{count} times: {message}")
    machine = describe_machine(dtype="float32", num_threads=1)
    return Report(
        machine=f"{machine}; {args.clients} clients, {args.minutes:g} minutes, seed {args.seed}",
        figures=figures(seen),
        must_hold=True,
    )


def figures(seen: Soak) -> list[Figure]:
    """What became of the requests, and the growth of everything."""
    return [
        Figure(name="requests answered", value=seen.caller.num_answered),
        Figure(name="requests cancelled", value=seen.num_cancelled),
        Figure(name="requests given up for their deadline", value=seen.caller.num_late),
        Figure(name="requests lost", value=sum(seen.caller.errors.values()), at_most=0),
        Figure(name="ranks killed", value=len(seen.faults)),
        *(growth.figure() for growth in growths(seen.snapshots)),
    ]
