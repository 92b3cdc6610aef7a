"""Latents, weights and traffic of a FLUX over several ranks, against the same FLUX on one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.layouts.messages import Denoised, Row
from benchmarks.layouts.pool import RankPool
from benchmarks.report import Figure
from triton_diffusion.config import ParallelConfig

ONE_RANK = ParallelConfig()
LAYOUTS = {
    "tp2": ParallelConfig(tp=2),
    "tp4": ParallelConfig(tp=4),
    "u2": ParallelConfig(ulysses=2),
    "u4": ParallelConfig(ulysses=4),
    "r2": ParallelConfig(ring=2),
    "r4": ParallelConfig(ring=4),
    "u2r2": ParallelConfig(ulysses=2, ring=2),
    "cfg2": ParallelConfig(cfg=2),
    "cfg2.u2": ParallelConfig(cfg=2, ulysses=2),
    "cfg2.r2": ParallelConfig(cfg=2, ring=2),
    "cfg2.tp2": ParallelConfig(cfg=2, tp=2),
    "tp2.u2": ParallelConfig(tp=2, ulysses=2),
    "tp2.r2": ParallelConfig(tp=2, ring=2),
    "cfg2.tp2.u2": ParallelConfig(cfg=2, tp=2, ulysses=2),
}
_BFLOAT16_LAYOUTS = ("u2", "r2", "tp2", "cfg2")

_LATENT_GOAL = 1e-4
TP2_WEIGHTS_GOAL = 0.55
"""Weights of a rank over the whole, at most."""
_NUM_HEADS, _HEAD_DIM = 4, 32
_NUM_LAYERS, _NUM_SINGLE_LAYERS = 2, 4
_TEXT_TOKENS = 48
_CHANNELS = 64
_SIZES = ((128, 128), (112, 144))
"""(height, width): 64 image tokens, which every layout divides, and 63, which none does."""
# The batch changes with every step but the last two, and the guided row, of two predictions, ends alone.
_ROWS = [
    Row(seed=1, num_inference_steps=4),
    Row(seed=2, num_inference_steps=4, joins_at=1),
    Row(seed=3, num_inference_steps=4, joins_at=2, guidance_scale=3.0),
]
_NUM_TICKS = 6
_LAST_TICK_PREDICTIONS = 2


def measure_layouts(layouts: Mapping[str, ParallelConfig] = LAYOUTS) -> list[Figure]:
    """Denoise a mixed batch in every layout: float32 latents, weights and traffic of a rank, bfloat16 errors."""
    # Here, since it imports torch, and takes seconds for it.
    from benchmarks.layouts.checkpoint import build_checkpoint

    with tempfile.TemporaryDirectory(prefix="triton-diffusion-parity-") as folder, RankPool() as pool:
        checkpoint = build_checkpoint(
            Path(folder) / "flux",
            num_heads=_NUM_HEADS,
            head_dim=_HEAD_DIM,
            num_layers=_NUM_LAYERS,
            num_single_layers=_NUM_SINGLE_LAYERS,
        )
        expected = [_denoise(pool, checkpoint, ONE_RANK, size) for size in _SIZES]
        figures = []
        for name, parallel in tqdm(layouts.items(), desc="layouts"):
            answers = [_denoise(pool, checkpoint, parallel, size) for size in _SIZES]
            figures += _figures(name, parallel, answers, [each[0] for each in expected])
        figures += _bfloat16_figures(pool, checkpoint, layouts, expected[0][0])
    return figures


def sent_bytes(
    parallel: ParallelConfig, *, num_predictions: int, num_image_tokens: int, item_size: int
) -> dict[str, float]:
    """What a rank sends in a step, by axis, where everything divides.

    Tensor parallelism: a ring all-reduce sends 2 (t - 1) / t of the tensor, and gathering (t - 1) / t of the whole.
    Ulysses: of query, key, value and output (u - 1) / u of a rank's tokens, and as much of the result's gathering.
    Ring: r - 1 times a rank's keys and values. CFG: its predictions to every other rank.
    """
    own = num_predictions / parallel.cfg
    tokens = (num_image_tokens + _TEXT_TOKENS) / parallel.sequence
    hidden = _NUM_HEADS * _HEAD_DIM
    num_attentions = _NUM_LAYERS + _NUM_SINGLE_LAYERS
    width = hidden / parallel.tp
    gathered = (parallel.sequence - 1) * own * num_image_tokens / parallel.sequence * _CHANNELS
    sums = own * tokens * hidden * (2 * _NUM_LAYERS + _NUM_SINGLE_LAYERS)
    modulation = own * hidden * (2 * 6 * _NUM_LAYERS + 3 * _NUM_SINGLE_LAYERS + 2)
    numbers = {
        "cfg": (parallel.cfg - 1) * own * num_image_tokens * _CHANNELS,
        "ring": (parallel.ring - 1) * num_attentions * 2 * own * tokens * width,
        "ulysses": (parallel.ulysses - 1) / parallel.ulysses * num_attentions * 4 * own * tokens * width,
        "tp": (parallel.tp - 1) / parallel.tp * (2 * sums + modulation),
    }
    # The result is put together over ring and ulysses taken as one.
    if parallel.ring > 1 and parallel.ulysses > 1:
        numbers["sequence"] = gathered
    elif parallel.sequence > 1:
        numbers["ring" if parallel.ring > 1 else "ulysses"] += gathered
    return {axis: item_size * number for axis, number in numbers.items() if number}


def _denoise(
    pool: RankPool, checkpoint: Path, parallel: ParallelConfig, size: tuple[int, int], dtype: str = "float32"
) -> list[Denoised]:
    return pool.run(
        checkpoint=str(checkpoint),
        dtype=dtype,
        parallel=parallel,
        height=size[0],
        width=size[1],
        rows=_ROWS,
        num_ticks=_NUM_TICKS,
    )


def _figures(
    name: str, parallel: ParallelConfig, answers: Sequence[Sequence[Denoised]], expected: Sequence[Denoised]
) -> list[Figure]:
    """answers: of all ranks, by size. expected: those of one rank."""
    difference = max(
        float(np.abs(latents_of(answer) - latents_of(one)).max())
        for ranks, one in zip(answers, expected, strict=True)
        for answer in ranks
    )
    even = answers[0]
    share = max(answer.weight_bytes for answer in even) / expected[0].weight_bytes
    figures = [
        Figure(name=f"layout {name}: latents, largest difference", value=difference, at_most=_LATENT_GOAL),
        Figure(
            name=f"layout {name}: weights of a rank over the whole",
            value=share,
            unit="x",
            at_most=TP2_WEIGHTS_GOAL if name == "tp2" else None,
        ),
    ]
    height, width = _SIZES[0]
    formula = sent_bytes(
        parallel, num_predictions=_LAST_TICK_PREDICTIONS, num_image_tokens=height * width // 256, item_size=4
    )
    for axis in sorted(formula.keys() | even[0].sent_bytes.keys()):
        sent = max(answer.sent_bytes.get(axis, 0) for answer in even)
        if axis not in formula:
            raise RuntimeError(f"layout {name} sent {sent} bytes over axis {axis}, of which the formula knows nothing")
        figures += [
            Figure(name=f"layout {name}: sent a step a rank over {axis}", value=sent / 1024, unit="KiB"),
            Figure(name=f"layout {name}: sent over {axis}, over the formula", value=sent / formula[axis], unit="x"),
        ]
    return figures


def _bfloat16_figures(
    pool: RankPool, checkpoint: Path, layouts: Mapping[str, ParallelConfig], expected: Denoised
) -> list[Figure]:
    """The error of bfloat16 against float32 on one rank, over that of one bfloat16 rank."""
    names = [name for name in _BFLOAT16_LAYOUTS if name in layouts]
    if not names:
        return []

    def error(parallel: ParallelConfig) -> float:
        answer = _denoise(pool, checkpoint, parallel, _SIZES[0], "bfloat16")[0]
        return float(np.sqrt(np.mean((latents_of(answer) - latents_of(expected)) ** 2)))

    one = error(ONE_RANK)
    figures = [Figure(name="one rank: bfloat16, root mean square error of the latents", value=one)]
    for name in names:
        value = error(layouts[name]) / one
        figures.append(Figure(name=f"layout {name}: bfloat16 error over that of one rank", value=value, unit="x"))
    return figures


def latents_of(answer: Denoised) -> NDArray[np.float32]:
    """The latents of all rows, one behind the other."""
    return np.concatenate([np.frombuffer(latents, np.float32) for latents in answer.latents])
