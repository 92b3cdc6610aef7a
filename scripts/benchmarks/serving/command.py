"""Flags, and the order in which everything is measured."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.baselines import DTYPE, MODEL_PATH, NUM_THREADS
from benchmarks.in_process import InProcessPipeline, Setup
from benchmarks.picture import PictureRequest, absolute_model_path, default_sequence_length
from benchmarks.report import Figure, Report, describe_machine
from benchmarks.running import busy_figure, tuning_of_ranks
from benchmarks.serving import cancel_storm, closed_loop, lone, memory, open_loop, saturation, short_behind_long
from benchmarks.serving.bench import Bench
from benchmarks.serving.processes import suspend
from benchmarks.serving.scale import FULL, QUICK
from benchmarks.serving.sides import BASELINES, Side, open_baseline, open_ours
from triton_diffusion.config import StageConfig

_SIDES = ("ours", *BASELINES, "limit")
_WORKLOADS = {
    "closed-loop": "pictures/s of 1, 4 and 16 clients",
    "open-loop": "random arrivals at 80 %% of the monolith's capacity, 4 to 50 steps",
    "short-behind-long": "4 steps behind eight requests of 50",
    "cancel-storm": "a third of the requests of 16 clients cancelled",
    "saturation": "where the processor's time goes at 16 clients",
    "memory": "growth of our processes over many requests",
    "sweep": "random arrivals at other loads; only with --plots unless named",
}
_OURS_ONLY = ("saturation", "memory")
_SIZE = 128
_NUM_INFERENCE_STEPS = 20
_SCRIPTS = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--quick", action="store_true", help="a short form that shows that all works; its figures say little")
    add("--sides", nargs="+", choices=_SIDES, default=_SIDES, metavar="SIDE", help=f"of {', '.join(_SIDES)}")
    workloads = "; ".join(f"{name}: {what}" for name, what in _WORKLOADS.items())
    add("--workloads", nargs="+", choices=_WORKLOADS, metavar="WORKLOAD", help=f"{workloads} (default: all)")
    add("--plots", type=Path, metavar="FOLDER", help="draw throughput.png and latency.png there")
    add("--memory-requests", type=int, metavar="N", help="requests of memory (default: 1000, with --quick 200)")
    add("--dtype", default="auto", help="compute type on all sides (default: %(default)s)")


def measure(args: argparse.Namespace) -> Report:
    """Start all sides, put every load on each, compare."""
    busy = busy_figure()
    with _open_setting(args) as setting:
        figures = _measure_all(setting, args)
        return Report(machine=setting.machine, figures=[busy, *figures])


@dataclass(frozen=True, kw_only=True)
class _Setting:
    bench: Bench
    machine: str
    settings: Mapping[str, str]
    """Of our server."""


@contextlib.contextmanager
def _open_setting(args: argparse.Namespace) -> Iterator[_Setting]:
    """All sides, started one after the other, warm, and stopped until they have their turn."""
    model_path = absolute_model_path(args.model_path)
    config = StageConfig(model_path=model_path, dtype=args.dtype)
    settings = {"model_path": model_path, "dtype": config.dtype}
    sides: dict[str, Side] = {}
    tuning: dict[str, str] = {}
    limit: InProcessPipeline | None = None
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        if "ours" in args.sides:
            ours = stack.enter_context(open_ours(settings, runner))
            sides["ours"] = ours
            tuning = tuning_of_ranks(ours.server)
            suspend(ours.pid)
        variables = tuning | _baseline_variables(config)
        for name in tqdm([name for name in args.sides if name in BASELINES], desc="starting baselines", unit="side"):
            sides[name] = stack.enter_context(open_baseline(name, variables, runner))
            suspend(sides[name].pid)
        if "limit" in args.sides:
            limit = stack.enter_context(InProcessPipeline(_pipeline_setup(config, tuning)))
        bench = Bench(
            sides=sides,
            limit=limit,
            runner=runner,
            scale=QUICK if args.quick else FULL,
            picture=_picture(model_path),
        )
        for name in tqdm(bench.names, desc="warm-up", unit="side"):
            bench.warm_up(name)
        yield _Setting(bench=bench, machine=_describe(bench, config, tuning), settings=settings)


def _baseline_variables(config: StageConfig) -> dict[str, str]:
    # Servers that import this package's baselines are started in other folders.
    return {
        MODEL_PATH: config.model_path,
        DTYPE: config.dtype,
        NUM_THREADS: str(config.threads_per_rank),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_SCRIPTS), os.environ.get("PYTHONPATH")])),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _pipeline_setup(config: StageConfig, tuning: Mapping[str, str]) -> Setup:
    return Setup(model_path=config.model_path, dtype=config.dtype, num_threads=config.threads_per_rank, tuning=tuning)


def _picture(model_path: str) -> PictureRequest:
    return PictureRequest(
        seed=0,
        height=_SIZE,
        width=_SIZE,
        num_inference_steps=_NUM_INFERENCE_STEPS,
        max_sequence_length=default_sequence_length(model_path),
    )


def _describe(bench: Bench, config: StageConfig, tuning: Mapping[str, str]) -> str:
    dtype = bench.limit.dtype if bench.limit else f"dtype={config.dtype}"
    machine = describe_machine(dtype=dtype, num_threads=config.threads_per_rank)
    threads = " ".join(f"{name}={value}" for name, value in sorted(tuning.items())) or "the libraries' defaults"
    form = "short form" if bench.scale is QUICK else "full form"
    return f"{machine}; {_SIZE}x{_SIZE}, {_NUM_INFERENCE_STEPS} steps; {form}, {bench.scale.rounds} rounds; {threads}"


def _measure_all(setting: _Setting, args: argparse.Namespace) -> list[Figure]:
    bench, workloads = setting.bench, _workloads(args)
    figures: list[Figure] = []
    if "closed-loop" in workloads:
        throughput = closed_loop.measure(bench)
        figures += closed_loop.figures(throughput)
        if args.plots is not None:
            draw_throughput(throughput, args.plots)
    if "open-loop" in workloads or "sweep" in workloads:
        figures += _measure_open_loops(bench, workloads, args.plots)
    if "short-behind-long" in workloads:
        figures += short_behind_long.figures(short_behind_long.measure(bench))
    if "cancel-storm" in workloads:
        figures += cancel_storm.figures(cancel_storm.measure(bench))
    if "saturation" in workloads:
        figures += saturation.figures(saturation.measure(bench))
    if "memory" in workloads:
        num_requests = args.memory_requests or (200 if args.quick else 1000)
        figures += memory.figures(memory.measure(bench, setting.settings, num_requests))
    return figures


def _measure_open_loops(bench: Bench, workloads: list[str], plots: Path | None) -> list[Figure]:
    alone = lone.measure(bench)
    figures = lone.figures(alone)
    if "open-loop" in workloads:
        figures += open_loop.figures(open_loop.measure(bench, alone), alone)
    if "sweep" in workloads:
        sweep = open_loop.measure_sweep(bench, alone)
        figures += [figure for result in sweep for figure in open_loop.sweep_figures(result, alone)]
        if plots is not None:
            draw_latency(sweep, alone.reference, plots)
    return figures


def _workloads(args: argparse.Namespace) -> list[str]:
    chosen = args.workloads or [name for name in _WORKLOADS if name != "sweep" or args.plots is not None]
    if set(args.sides) == {"limit"}:
        return [name for name in chosen if name == "closed-loop"]
    return [name for name in chosen if "ours" in args.sides or name not in _OURS_ONLY]


def draw_throughput(result: closed_loop.ClosedLoopResult, folder: Path) -> None:
    # Only those who draw need matplotlib.
    from benchmarks.serving import plots

    plots.draw_throughput(result, folder / "throughput.png")


def draw_latency(results: list[open_loop.OpenLoopResult], reference: str, folder: Path) -> None:
    from benchmarks.serving import plots

    plots.draw_latency(results, reference, folder / "latency.png")
