"""Latency of a served picture over that of the same picture from diffusers' FluxPipeline in process.

One client. The sides take turns, picture by picture and in every order, so that a slow moment of the machine hits all
alike; while one works, the others wait without spinning. The pipeline runs twice: with the settings of the
server's ranks for OpenMP and malloc, and with the defaults of both; the goal is held against the faster one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.in_process import InProcessPipeline, Setup
from benchmarks.picture import PictureRequest, absolute_model_path, default_sequence_length
from benchmarks.report import Figure, Report, describe_machine
from benchmarks.running import busy_figure, named_processes, running_server, tuning_of_ranks
from triton_diffusion.config import StageConfig
from triton_diffusion.server import TritonServer
from triton_diffusion_client import DiffusionClient

_GOAL = 1.05
# OpenMP's threads spin for some milliseconds behind their last work; the next side shall not feel it.
_PAUSE_S = 0.05
_SERVED = "served"
_IN_PROCESS = "in process"
_WITH_DEFAULTS = "in process, defaults"


@dataclass(frozen=True, kw_only=True)
class _Sample:
    latency_s: float
    parts_s: Mapping[str, float]
    pixels: NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class _Side:
    draw: Callable[[PictureRequest], _Sample]
    processes: Mapping[str, psutil.Process]
    """By what they are for; their processor time counts for this side."""


_Samples = Mapping[str, Sequence[_Sample]]
_CpuSeconds = Mapping[tuple[str, str], float]
"""By side and process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[128, 256], metavar="PX", help="pictures' sides (default: 128 256)")
    add("--num-inference-steps", type=int, default=20, help="(default: %(default)s)")
    add("--rounds", type=int, default=36, help="pictures of each side and size that count (default: %(default)s)")
    add("--warm-up", type=int, default=6, help="pictures before those (default: %(default)s)")
    add("--protocol", choices=("grpc", "http"), default="grpc", help="(default: %(default)s)")
    add("--dtype", default="auto", help="compute type on both sides (default: %(default)s)")
    add("--num-threads", type=int, default=0, help="threads of a rank and of the pipeline; 0: as many as cores")
    add(
        "--defaults",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the pipeline with the libraries' defaults, too; very slow on a busy machine (default: yes)",
    )


def measure(args: argparse.Namespace) -> Report:
    """Start all sides, let them take turns, compare."""
    model_path = absolute_model_path(args.model_path)
    config = StageConfig(model_path=model_path, dtype=args.dtype, num_threads=args.num_threads)
    settings = {"model_path": model_path, "dtype": config.dtype, "num_threads": str(config.num_threads)}
    with (
        running_server(settings) as server,
        _pipeline(config, tuning_of_ranks(server)) as like_ranks,
        _pipeline(config, {}) if args.defaults else contextlib.nullcontext() as with_defaults,
        DiffusionClient(_address(server, args.protocol), args.protocol) as client,
    ):
        sides = {
            _SERVED: _Side(
                draw=lambda request: _serve(client, request),
                processes=named_processes(server) | {"client": psutil.Process()},
            ),
            _IN_PROCESS: _pipeline_side(like_ranks),
        }
        if with_defaults is not None:
            sides[_WITH_DEFAULTS] = _pipeline_side(with_defaults)
        figures = [busy_figure()]
        for size in args.sizes:
            samples, cpu_s = _take_turns(sides, size, model_path, args)
            figures += _figures(f"{size}x{size}", samples, cpu_s)
        machine = describe_machine(dtype=like_ranks.dtype, num_threads=config.threads_per_rank)
    return Report(machine=machine, figures=figures)


def _address(server: TritonServer, protocol: str) -> str:
    return server.grpc_address if protocol == "grpc" else server.http_address


def _pipeline(config: StageConfig, tuning: Mapping[str, str]) -> InProcessPipeline:
    return InProcessPipeline(
        Setup(model_path=config.model_path, dtype=config.dtype, num_threads=config.threads_per_rank, tuning=tuning)
    )


def _pipeline_side(pipeline: InProcessPipeline) -> _Side:
    return _Side(draw=lambda request: _call(pipeline, request), processes={"pipeline": psutil.Process(pipeline.pid)})


def _take_turns(
    sides: Mapping[str, _Side], size: int, model_path: str, args: argparse.Namespace
) -> tuple[_Samples, _CpuSeconds]:
    """Every side draws the same picture in every round; the order goes through all there are.

    Returns the samples, and the processor time of each process for one picture.
    """
    cpu_before: _CpuSeconds = {}
    samples: dict[str, list[_Sample]] = {name: [] for name in sides}
    orders = itertools.cycle(itertools.permutations(sides))
    rounds = tqdm(range(-args.warm_up, args.rounds), desc=f"{size}x{size}", unit="round", mininterval=1)
    for index, order in zip(rounds, orders, strict=False):
        if index == 0:
            cpu_before = _cpu_seconds(sides)
        request = PictureRequest(
            seed=args.warm_up + index,
            height=size,
            width=size,
            num_inference_steps=args.num_inference_steps,
            max_sequence_length=default_sequence_length(model_path),
        )
        for name in order:
            time.sleep(_PAUSE_S)
            sample = sides[name].draw(request)
            if index >= 0:
                samples[name].append(sample)
    cpu_after = _cpu_seconds(sides)
    return samples, {key: (cpu_after[key] - before) / args.rounds for key, before in cpu_before.items()}


def _cpu_seconds(sides: Mapping[str, _Side]) -> dict[tuple[str, str], float]:
    seconds = {}
    for side_name, side in sides.items():
        for process_name, process in side.processes.items():
            times = process.cpu_times()
            seconds[side_name, process_name] = times.user + times.system
    return seconds


def _serve(client: DiffusionClient, request: PictureRequest) -> _Sample:
    started = time.perf_counter()
    result = client.generate(request.prompt, **request.client_options())
    answered = time.perf_counter()
    picture = result.images[0]
    ended = time.perf_counter()
    timings = result.timings
    stages_s = {name.replace("_", " "): seconds for name, seconds in timings.stages_s.items()}
    parts_s = stages_s | {
        "denoising, its steps": sum(timings.steps_s),
        "queues": timings.queue_s,
        "between the stages": timings.total_s - timings.queue_s - sum(stages_s.values()),
        "transport": answered - started - timings.total_s,
        "opening the PNG": ended - answered,
    }
    return _Sample(latency_s=ended - started, parts_s=parts_s, pixels=np.asarray(picture))


def _call(pipeline: InProcessPipeline, request: PictureRequest) -> _Sample:
    result = pipeline.generate(request)
    return _Sample(latency_s=result.latency_s, parts_s=result.parts_s, pixels=result.array)


def _figures(title: str, samples: _Samples, cpu_s: _CpuSeconds) -> list[Figure]:
    pipelines = [name for name in samples if name != _SERVED]
    reference = min(pipelines, key=lambda name: _median_s(samples[name]))
    ratio = _median_s(samples[_SERVED]) / _median_s(samples[reference])
    by_round = [
        ours.latency_s / theirs.latency_s for ours, theirs in zip(samples[_SERVED], samples[reference], strict=True)
    ]
    figures = [
        Figure(name=f"{title}: latency, served over {reference}", value=ratio, at_most=_GOAL),
        Figure(name=f"{title}: the same, median of the rounds' ratios", value=statistics.median(by_round)),
        Figure(name=f"{title}: largest difference of a pixel", value=_pixel_difference(samples, reference)),
    ]
    for name in samples:
        figures += _latency_figures(f"{title}: {name}", [sample.latency_s for sample in samples[name]])
    for name in (_SERVED, reference):
        figures += [
            _milliseconds(f"{title}: {name}: {part}", statistics.median(each.parts_s[part] for each in samples[name]))
            for part in samples[name][0].parts_s
        ]
    for name in samples:
        of_side = {process: seconds for (side, process), seconds in cpu_s.items() if side == name}
        figures.append(_milliseconds(f"{title}: {name}: processor time a picture", sum(of_side.values())))
        if len(of_side) > 1:
            figures += [
                _milliseconds(f"{title}: {name}: processor time a picture, {process}", seconds)
                for process, seconds in of_side.items()
            ]
    return figures


def _median_s(samples: Sequence[_Sample]) -> float:
    return statistics.median(sample.latency_s for sample in samples)


def _latency_figures(name: str, latencies_s: Sequence[float]) -> list[Figure]:
    deciles = statistics.quantiles(latencies_s, n=10, method="inclusive")
    return [
        _milliseconds(f"{name}: latency, median", statistics.median(latencies_s)),
        _milliseconds(f"{name}: latency, p10", deciles[0]),
        _milliseconds(f"{name}: latency, p90", deciles[-1]),
    ]


def _milliseconds(name: str, seconds: float) -> Figure:
    return Figure(name=name, value=1000 * seconds, unit="ms")


def _pixel_difference(samples: _Samples, reference: str) -> int:
    pairs = zip(samples[_SERVED], samples[reference], strict=True)
    return max(int(np.abs(ours.pixels.astype(int) - theirs.pixels).max()) for ours, theirs in pairs)
