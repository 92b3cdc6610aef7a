"""Compare scheduling policies by simulation: the real scheduler, a simulated clock, ticks as long as a table says."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from simulation.cost_table import CostTable, load_cost_table
from simulation.files import number
from simulation.report import Summary, format_groups, format_runs, summarise, to_json
from simulation.simulator import Settings, SimulatedPolicy, simulate
from simulation.workload import Arrivals, Kind, Workload, capacity_per_s, load_mix
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.scheduler import DEFAULT_PRIORITY, HIGHEST_PRIORITY, LOWEST_PRIORITY, DeadlineAction


def main(arguments: list[str] | None = None) -> int:
    """Simulate every policy at every number of replicas; returns the exit code."""
    args = _parse_arguments(arguments)
    try:
        _check(args)
        table = load_cost_table(args.cost_table, args.max_batch_tokens)
        kinds = load_mix(args.mix, table)
        summaries = [
            _simulate(args, table, kinds, policy, num_replicas)
            for num_replicas in args.replicas
            for policy in args.policies
        ]
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(_describe(args, table, kinds))
    print(f"\n{format_groups(summaries, args.slo_factor)}\n\n{format_runs(summaries)}")
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(to_json(summaries, settings), indent=2) + "\n")
    return 0


def _simulate(
    args: argparse.Namespace, table: CostTable, kinds: tuple[Kind, ...], policy: SimulatedPolicy, num_replicas: int
) -> Summary:
    capacity = num_replicas * _capacity_per_s(args, table, kinds)
    rate_per_s = args.load * capacity if args.rate is None else args.rate
    mean_lone_s = 1 / capacity_per_s(kinds, table, guided_share=args.guided_share, batched=False)
    workload = Workload(
        kinds=kinds,
        rate_per_s=rate_per_s,
        num_requests=args.requests,
        seed=args.seed,
        arrivals=args.arrivals,
        burst_factor=args.burst_factor,
        burst_s=10 * mean_lone_s if args.burst_s is None else args.burst_s,
        guided_share=args.guided_share,
        priorities=tuple(args.priorities),
        deadline_factor=args.deadline_factor,
        deadline_action=args.deadline_action,
        cancel_share=args.cancel_share,
    )
    settings = Settings(
        policy=policy,
        num_replicas=num_replicas,
        max_queue_size=args.max_queue_size,
        ticks_in_flight=args.ticks_in_flight,
        slowdown=args.slowdown,
        ageing_s=args.ageing_s,
        noise=args.noise,
    )
    name = f"{policy}, {num_replicas} replica{'s' if num_replicas > 1 else ''}"
    with tqdm(desc=name, total=args.requests, unit=" requests", mininterval=0.5 if sys.stderr.isatty() else 60) as bar:
        result = simulate(workload, table, settings, on_progress=bar.update)
    return summarise(
        result,
        workload,
        policy=policy,
        num_replicas=num_replicas,
        load=rate_per_s / capacity,
        slo_factor=args.slo_factor,
    )


def _capacity_per_s(args: argparse.Namespace, table: CostTable, kinds: tuple[Kind, ...]) -> float:
    return capacity_per_s(kinds, table, guided_share=args.guided_share, batched=args.load_of == "batched")


def _describe(args: argparse.Namespace, table: CostTable, kinds: tuple[Kind, ...]) -> str:
    batched, lone = (
        capacity_per_s(kinds, table, guided_share=args.guided_share, batched=batched) for batched in (True, False)
    )
    rate = f"{args.load:g} of the capacity ({args.load_of})" if args.rate is None else f"{args.rate:g} requests/s"
    return (
        f"{args.requests} requests, {args.arrivals} arrivals at {rate}, seed {args.seed}\n"
        f"mix {args.mix} on {table.device}, {table.max_batch_tokens} tokens a batch; a replica can do {batched:.4g} "
        f"requests/s in full batches, {lone:.4g} one after the other"
    )


def _check(args: argparse.Namespace) -> None:
    """What argparse does not check; raises ConfigurationError."""
    for name in ("load", "rate", "burst_s", "slo_factor", "deadline_factor", "slowdown", "ageing_s"):
        if getattr(args, name) is not None:
            number(_flag(name), getattr(args, name))
    for name in ("requests", "max_queue_size", "ticks_in_flight", "max_batch_tokens"):
        if getattr(args, name) is not None:
            number(_flag(name), getattr(args, name), whole=True)
    for replicas in args.replicas:
        number("--replicas", replicas, whole=True)
    for name in ("guided_share", "cancel_share"):
        if not 0 <= getattr(args, name) <= 1:
            raise ConfigurationError(f"{_flag(name)}={getattr(args, name)} must be a share from 0 to 1; change it")
    if args.noise < 0:
        raise ConfigurationError(f"--noise={args.noise} must not be negative; 0 is none")
    if args.burst_factor <= 1:
        raise ConfigurationError(f"--burst-factor={args.burst_factor} must be above 1; 1 is --arrivals poisson")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    rate = parser.add_mutually_exclusive_group()

    def add(flag: str, description: str, *, to: Any = parser, **values: Any) -> None:
        if values.get("default") is not None:
            shown = values["default"]
            description += f" (default: {' '.join(map(str, shown)) if isinstance(shown, list) else shown})"
        to.add_argument(flag, help=description, **values)

    policies = list(get_args(SimulatedPolicy))
    priorities = range(LOWEST_PRIORITY, HIGHEST_PRIORITY + 1)
    add("--mix", "images, short-long, images-videos, or a JSON file", default="short-long", metavar="NAME|FILE")
    add(
        "--cost-table",
        "demo-cpu, flux-h200, or a JSON file as the server's calibration writes it",
        default="demo-cpu",
        metavar="NAME|FILE",
    )
    add(
        "--policies",
        "reference: one request at a time, all its steps",
        nargs="+",
        choices=policies,
        default=policies,
        metavar="POLICY",
    )
    add("--replicas", "one or several numbers", type=int, nargs="+", default=[1], metavar="N")
    add("--requests", "how many arrive", type=int, default=10_000, metavar="N")
    add("--seed", "of all that is drawn", type=int, default=0, metavar="N")
    add("--load", "arrivals as a share of the capacity", to=rate, type=float, default=0.8, metavar="X")
    add("--rate", "arrivals a second, in place of --load", to=rate, type=float, metavar="X")
    add(
        "--load-of",
        "the capacity of --load: of full batches, or of one request after the other",
        choices=("batched", "lone"),
        default="batched",
    )
    add("--arrivals", "at random, or in bursts with silence between", choices=get_args(Arrivals), default="poisson")
    add("--burst-factor", "rate in a burst over the mean rate", type=float, default=4.0, metavar="X")
    add("--burst-s", "mean length of a burst (default: ten mean lone latencies)", type=float, metavar="S")
    add("--guided-share", "share of requests with twice the tokens", type=float, default=0.0, metavar="X")
    add(
        "--priorities",
        "drawn evenly from these, 0 to 9",
        type=int,
        nargs="+",
        choices=priorities,
        default=[DEFAULT_PRIORITY],
        metavar="N",
    )
    add("--deadline-factor", "deadline over lone latency (default: no deadlines)", type=float, metavar="X")
    add("--deadline-action", "as in a request", choices=get_args(DeadlineAction), default="refuse")
    add("--cancel-share", "share of callers that may go away early", type=float, default=0.0, metavar="X")
    add("--slo-factor", "well served: within so many lone latencies", type=float, default=3.0, metavar="X")
    add("--noise", "standard deviation of the log of a tick's seconds", type=float, default=0.05, metavar="X")
    add("--max-batch-tokens", "tokens in one tick (default: as in the cost table)", type=int, metavar="N")
    add("--max-queue-size", "requests that may be here, for each replica", type=int, default=256, metavar="N")
    add("--ticks-in-flight", "of a replica; above 1 only while ticks are short", type=int, default=1, metavar="N")
    add("--slowdown", "a request is due after so many times its lone latency", type=float, default=5.0, metavar="X")
    add("--ageing-s", "seconds overdue that raise a priority by 1", type=float, default=30.0, metavar="S")
    add("--json", "write the figures to FILE, too", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
