"""Flags, and what is measured in which order."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections import Counter
from collections.abc import Sequence

from benchmarks.faults.examiner import TOLERANCE, Examiner, draw_references
from benchmarks.faults.ranks import KINDS, Injector
from benchmarks.faults.trial import Trial, different_requests, disturbed_trial, undisturbed_trial
from benchmarks.picture import absolute_model_path, default_sequence_length
from benchmarks.report import Figure, Report, describe_machine
from benchmarks.running import LOG_FILE, busy_figure, running_server
from triton_diffusion.server import TritonServer
from triton_diffusion_client import AsyncDiffusionClient

STAGES = ("text_encoding", "denoising", "decoding")
SETTINGS = {
    "dtype": "float32",
    "num_gpus": "2",
    "dp_size": "2",
    "denoising.num_gpus": "4",
    "denoising.ring_degree": "2",
    "num_threads": "1",
    # A step takes a tenth of a second; cores that are busy with ranks that start make it a second or two.
    "watchdog_floor_s": "5",
    "watchdog_ceiling_s": "60",
}
"""Parameters of the server, but for the checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, help="length of the disturbed run (default: %(default)s)")
    add("--undisturbed-minutes", type=float, default=1.0, help="and of the one before it (default: %(default)s)")
    add("--every", type=float, default=10.0, metavar="SECONDS", help="between faults (default: %(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what happens to ranks (default: both)")
    add("--seed", type=int, default=0, help="of the choice of ranks (default: %(default)s)")
    add("--clients", type=int, default=16, help="(default: %(default)s)")
    add("--pictures", type=int, default=24, help="different pictures that are asked for (default: %(default)s)")


def measure(args: argparse.Namespace) -> Report:
    """Both runs on one server."""
    model_path = absolute_model_path(args.model_path)
    busy = busy_figure()
    with running_server({"model_path": model_path, **SETTINGS}, stages=STAGES) as server:
        undisturbed, disturbed = asyncio.run(_run(server, args, default_sequence_length(model_path)))
    for message, count in Counter(disturbed.examiner.errors).most_common(10):
        print(f"{count} times at the first try: {message}")
    machine = describe_machine(dtype="float32", num_threads=1)
    load = f"{args.clients} clients, denoising 2 x 2 ranks (ring), other stages 2 x 1, seed {args.seed}"
    return Report(
        machine=f"{machine}; {load}",
        figures=[busy, *figures(undisturbed, disturbed)],
        must_hold=True,
    )


async def _run(server: TritonServer, args: argparse.Namespace, max_sequence_length: int) -> tuple[Trial, Trial]:
    requests = different_requests(args.pictures, max_sequence_length)
    async with AsyncDiffusionClient(server.grpc_address, retries=0) as client:
        references = await draw_references(client, requests)
        undisturbed = await undisturbed_trial(
            Examiner(client, references), requests, clients=args.clients, duration_s=60 * args.undisturbed_minutes
        )
        disturbed = await disturbed_trial(
            Examiner(client, references),
            requests,
            Injector(server.pid, seed=args.seed, kinds=args.kinds),
            clients=args.clients,
            duration_s=60 * args.minutes,
            every_s=args.every,
            log_path=LOG_FILE,
        )
    return undisturbed, disturbed


def figures(undisturbed: Trial, disturbed: Trial) -> list[Figure]:
    """What was lost, how long it took, and what it cost."""
    examiner = disturbed.examiner
    made = [
        Figure(name=f"faults: {kind}", value=sum(fault.kind == kind for fault in disturbed.faults)) for kind in KINDS
    ]
    made += [
        Figure(name="requests answered while disturbed", value=examiner.num_answered),
        Figure(name="requests lost", value=len(examiner.losses), at_most=0),
        Figure(name="requests that fail without another try of the client", value=len(examiner.errors), at_most=0),
        Figure(name=f"wrong pictures (a pixel differs by more than {TOLERANCE})", value=examiner.num_wrong, at_most=0),
        Figure(name="wrong pictures while undisturbed", value=undisturbed.examiner.num_wrong, at_most=0),
        Figure(name="largest difference of a pixel", value=max(examiner.differences, default=0)),
        Figure(name="groups that did not come back", value=disturbed.recoveries_s.count(None), at_most=0),
    ]
    made += _recovery_figures("from a fault until the group is ready", disturbed.recoveries_s)
    for kind in KINDS:
        of_kind = [
            recovery_s
            for fault, recovery_s in zip(disturbed.faults, disturbed.recoveries_s, strict=True)
            if fault.kind == kind
        ]
        made += _recovery_figures(f"from a fault until the group is ready, {kind}", of_kind)
    made += _latency_figures("latency, undisturbed", [each.latency_s for each in undisturbed.sent])
    made += _latency_figures("latency of requests under way at a fault", disturbed.hit_latencies_s)
    return [
        *made,
        Figure(name="undisturbed", value=undisturbed.pictures_per_s, unit="pictures/s"),
        Figure(name="disturbed", value=disturbed.pictures_per_s, unit="pictures/s"),
        Figure(
            name="disturbed over undisturbed",
            value=100 * disturbed.pictures_per_s / undisturbed.pictures_per_s,
            unit="%",
        ),
    ]


def _recovery_figures(name: str, recoveries_s: Sequence[float | None]) -> list[Figure]:
    return _median_and_worst(name, [recovery_s for recovery_s in recoveries_s if recovery_s is not None])


def _latency_figures(name: str, latencies_s: Sequence[float]) -> list[Figure]:
    return _median_and_worst(name, latencies_s)


def _median_and_worst(name: str, seconds: Sequence[float]) -> list[Figure]:
    if not seconds:
        return []
    return [
        Figure(name=f"{name}, median", value=statistics.median(seconds), unit="s"),
        Figure(name=f"{name}, worst", value=max(seconds), unit="s"),
    ]
