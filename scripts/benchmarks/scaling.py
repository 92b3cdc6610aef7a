"""How much faster two ranks make a step than one, and than the ranks of other projects; memory of a rank.

A FLUX of real proportions with random weights, a thread a rank, without a server. All sides are held ready and measured
in turns: while one works, the others wait for their next job.

What two cores give at best is a figure, too: two ranks of their own at once against one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.layouts.messages import Denoised, Row
from benchmarks.layouts.parity import LAYOUTS, ONE_RANK, TP2_WEIGHTS_GOAL, latents_of
from benchmarks.layouts.pool import RankPool
from benchmarks.report import Figure, Report, describe_machine
from triton_diffusion.config import ParallelConfig

_GOALS = {"u2": 1.85, "r2": 1.85, "tp2": 1.6, "cfg2": 1.95}
_GUIDANCE_SCALE = 3.0
_PEERS = {
    "diffusers-ulysses": "u2",
    "cache-dit-ulysses": "u2",
    "diffusers-tp": "tp2",
}
"""Programs of benchmarks.layouts.peers, and the layout of ours that each is compared with."""
_PEER_GOALS = {"diffusers-ulysses": 1.0}
_LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.5}
"""Between the latents of a side and of one rank, over the largest of these."""
_MIB = 2**20


@dataclass
class _Side:
    """One way to make a step."""

    name: str
    run: Callable[[], list[Denoised]]
    step_s: list[float] = field(default_factory=list)
    """Of each round."""
    answers: list[Denoised] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """Of all rounds."""
        return statistics.median(self.step_s)

    def over(self, other: _Side) -> float:
        """The time of a step over that of the other: the median over rounds, in which both ran close to each other."""
        pairs = zip(self.step_s, other.step_s, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def measure(self, *, keep: bool) -> None:
        """A job; a step takes as long as on its slowest rank."""
        self.answers = self.run()
        if keep:
            steps = zip(*(answer.tick_s for answer in self.answers), strict=True)
            self.step_s.append(statistics.median(max(ranks) for ranks in steps))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="turns of every side (default: %(default)s)")
    add("--steps", type=int, default=3, help="steps of a turn that are timed (default: %(default)s)")
    add("--size", type=int, default=512, metavar="PX", help="height and width; 16 x 16 a token (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (default: %(default)s)")
    add("--heads", type=int, default=8, help="attention heads of the transformer (default: %(default)s)")
    add("--head-dim", type=int, default=64, help="their size (default: %(default)s)")
    add("--layers", type=int, nargs=2, default=[2, 4], help="double and single blocks (default: %(default)s)")
    add("--layouts", nargs="+", choices=_GOALS, default=list(_GOALS), help="of two ranks (default: all)")
    add("--no-peers", action="store_true", help="leave diffusers' and cache-dit's parallelism out")
    add(
        "--cache-dit",
        type=Path,
        metavar="FOLDER",
        help="compare with cache-dit, too: where `pip install --no-deps --target FOLDER cache-dit einops` put it",
    )


def measure(args: argparse.Namespace) -> Report:
    """Run all sides in turns, after a round that is thrown away."""
    # Here, since it imports torch, and takes seconds for it.
    from benchmarks.layouts.checkpoint import build_checkpoint

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="triton-diffusion-scaling-")))
        double, single = args.layers
        checkpoint = build_checkpoint(
            folder / "flux",
            num_heads=args.heads,
            head_dim=args.head_dim,
            num_layers=double,
            num_single_layers=single,
        )
        sides = _make_sides(args, checkpoint, stack)
        for turn in tqdm(range(args.rounds + 1), desc="rounds"):
            for side in sides.values():
                side.measure(keep=turn > 0)
    _require_equal_latents(sides, args.dtype)
    figures = [*_time_figures(sides), *_memory_figures(sides)]
    tokens = (args.size // 16) ** 2
    model = f"FLUX of {double} + {single} blocks, {args.heads} heads of {args.head_dim}, {tokens} image tokens"
    machine = describe_machine(dtype=args.dtype, num_threads=1)
    return Report(machine=f"{machine}; {model}; median of {args.rounds} rounds of {args.steps} steps", figures=figures)


def _make_sides(args: argparse.Namespace, checkpoint: Path, stack: ExitStack) -> dict[str, _Side]:
    def job(parallel: ParallelConfig, guidance_scale: float = 1.0) -> dict[str, Any]:
        num_steps = args.steps + 1
        row = Row(seed=1, num_inference_steps=num_steps, guidance_scale=guidance_scale)
        return {
            "checkpoint": str(checkpoint),
            "dtype": args.dtype,
            "parallel": parallel,
            "height": args.size,
            "width": args.size,
            "rows": [row],
            "num_ticks": num_steps,
            "warm_up_ticks": 1,
            "keep_open": True,
        }

    pool = stack.enter_context(RankPool())
    threads = stack.enter_context(ThreadPoolExecutor(2))
    # A process holds one layout; what runs on one rank shares a process. Threads must not start any.
    pool.prepare(2)

    def run_two_apart() -> list[Denoised]:
        first, second = threads.map(lambda process: pool.run(process, **job(ONE_RANK)), (0, 1))
        return [*first, *second]

    one, guided = job(ONE_RANK), job(ONE_RANK, _GUIDANCE_SCALE)
    sides = [
        _Side("one", partial(pool.run, 0, **one)),
        _Side("apart", run_two_apart),
        _Side("one guided", partial(pool.run, 0, **guided)),
    ]
    for index, name in enumerate(args.layouts, 1):
        guidance_scale = _GUIDANCE_SCALE if name == "cfg2" else 1.0
        sides.append(_Side(name, partial(pool.run, 2 * index, **job(LAYOUTS[name], guidance_scale))))
    for peer, ours in {} if args.no_peers else _PEERS.items():
        program = ["benchmarks.layouts.peers", peer]
        if ours not in args.layouts:
            continue
        if peer == "cache-dit-ulysses":
            if args.cache_dit is None:
                continue
            program += ["--path", str(args.cache_dit.resolve())]
        peer_pool = stack.enter_context(RankPool(program))
        sides.append(_Side(peer, partial(peer_pool.run, 0, **job(LAYOUTS[ours]))))
    return {side.name: side for side in sides}


def _require_equal_latents(sides: Mapping[str, _Side], dtype: str) -> None:
    """Raise RuntimeError if a side computed something else: then its times mean nothing."""
    for side in sides.values():
        expected = latents_of(sides["one guided" if side.name == "cfg2" else "one"].answers[0])
        if side.name != "one guided":
            difference = float(np.abs(latents_of(side.answers[0]) - expected).max() / np.abs(expected).max())
            if not difference <= _LARGEST_DIFFERENCE[dtype]:
                raise RuntimeError(
                    f"{side.name} makes other latents than one rank: off by {difference:.2g} of the largest"
                )


def _time_figures(sides: Mapping[str, _Side]) -> list[Figure]:
    one = sides["one"]
    figures = [
        Figure(name="one rank: a step", value=1000 * one.median_s, unit="ms"),
        Figure(
            name="two ranks apart, each a request of its own: steps over those of one",
            value=2 * one.over(sides["apart"]),
            unit="x",
        ),
    ]
    for name, goal in _GOALS.items():
        if name not in sides:
            continue
        alone, request = (sides["one guided"], "guided step") if name == "cfg2" else (one, "step")
        side = sides[name]
        figures += [
            Figure(name=f"layout {name}: a {request}", value=1000 * side.median_s, unit="ms"),
            Figure(
                name=f"layout {name}: {request} of one rank over that of two",
                value=alone.over(side),
                unit="x",
                at_least=goal,
            ),
        ]
    for peer, ours in _PEERS.items():
        if peer in sides:
            value = sides[ours].over(sides[peer])
            figures += [
                Figure(name=f"{peer}: a step", value=1000 * sides[peer].median_s, unit="ms"),
                Figure(name=f"{ours} over {peer}: a step", value=value, unit="x", at_most=_PEER_GOALS.get(peer)),
            ]
    return figures


def _memory_figures(sides: Mapping[str, _Side]) -> list[Figure]:
    figures = []
    whole = sides["one"].answers[0].weight_bytes
    # A process of one rank runs guided steps, too, and its peak is of those.
    for name in ("one guided", *(name for name in _GOALS if name in sides)):
        answers = sides[name].answers
        label = "one rank" if name == "one guided" else f"layout {name}"
        peak, weights = (max(getattr(each, what) for each in answers) for what in ("peak_bytes", "weight_bytes"))
        goal = TP2_WEIGHTS_GOAL if name == "tp2" else None
        figures += [
            Figure(name=f"{label}: resident memory of a rank at its peak", value=round(peak / _MIB, 1), unit="MiB"),
            Figure(name=f"{label}: weights of a rank", value=round(weights / _MIB, 1), unit="MiB"),
            Figure(name=f"{label}: weights of a rank over the whole", value=weights / whole, unit="x", at_most=goal),
        ]
    return figures
