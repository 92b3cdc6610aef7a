"""Seconds from start to ready, and the memory of every process of a server."""

from __future__ import annotations

import argparse
import statistics
import time

from tqdm import tqdm

from benchmarks.picture import PROMPT, absolute_model_path
from benchmarks.report import Figure, Report, describe_machine
from benchmarks.running import named_processes, prepared_server, shared_memory_segments, wait_until_ready
from triton_diffusion.config import StageConfig
from triton_diffusion.server import TritonServer
from triton_diffusion_client import DiffusionClient

_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--starts", type=int, default=3, help="starts that are timed (default: %(default)s)")
    add("--requests", type=int, default=20, help="pictures between the two looks at memory (default: %(default)s)")
    add("--num-inference-steps", type=int, default=20, help="(default: %(default)s)")
    add("--dtype", default="auto", help="compute type (default: %(default)s)")


def measure(args: argparse.Namespace) -> Report:
    """Start servers one after the other; look into the last one."""
    model_path = absolute_model_path(args.model_path)
    config = StageConfig(model_path=model_path, dtype=args.dtype)
    settings = {"model_path": model_path, "dtype": config.dtype}
    starts_s: list[float] = []
    inside: list[Figure] = []
    for index in tqdm(range(args.starts), desc="starts"):
        with prepared_server(settings) as server:
            started = time.perf_counter()
            with server:
                wait_until_ready(server, poll_s=0.02)
                starts_s.append(time.perf_counter() - started)
                if index == args.starts - 1:
                    inside = _figures_inside(server, args)
    figures = [
        Figure(name="start to ready, median", value=statistics.median(starts_s), unit="s"),
        Figure(name="start to ready, fastest", value=min(starts_s), unit="s"),
        Figure(name="start to ready, slowest", value=max(starts_s), unit="s"),
        *inside,
    ]
    machine = describe_machine(dtype=f"dtype={config.dtype}", num_threads=config.threads_per_rank)
    return Report(machine=machine, figures=figures)


def _figures_inside(server: TritonServer, args: argparse.Namespace) -> list[Figure]:
    figures = _memory_figures("after the start", server)
    latencies_s = []
    with DiffusionClient(server.grpc_address) as client:
        for seed in tqdm(range(args.requests), desc="pictures"):
            started = time.perf_counter()
            client.generate(PROMPT, seed=seed, num_inference_steps=args.num_inference_steps)
            latencies_s.append(time.perf_counter() - started)
    return [
        Figure(name="first picture", value=latencies_s[0], unit="s"),
        Figure(name="a later picture, median", value=statistics.median(latencies_s[1:] or latencies_s), unit="s"),
        *figures,
        *_memory_figures(f"after {args.requests} pictures", server),
    ]


def _memory_figures(when: str, server: TritonServer) -> list[Figure]:
    """PSS shares out what processes have in common, so that it adds up; RSS counts it in each of them."""
    processes = named_processes(server)
    memory = {name: process.memory_full_info() for name, process in processes.items()}
    pss = {name: each.pss for name, each in memory.items()} | {"all": sum(each.pss for each in memory.values())}
    rss = {name: each.rss for name, each in memory.items()} | {"all": sum(each.rss for each in memory.values())}
    figures = []
    for name in pss:
        figures.append(_mebibytes(f"{when}: {name}, PSS", pss[name]))
        figures.append(_mebibytes(f"{when}: {name}, RSS", rss[name]))
    num_threads = sum(process.num_threads() for process in processes.values())
    return [
        *figures,
        _mebibytes(f"{when}: /dev/shm", sum(size_bytes for _, size_bytes in shared_memory_segments())),
        Figure(name=f"{when}: processes", value=len(processes)),
        Figure(name=f"{when}: threads", value=num_threads),
    ]


def _mebibytes(name: str, size_bytes: int) -> Figure:
    return Figure(name=name, value=round(size_bytes / _MIB, 1), unit="MiB")
