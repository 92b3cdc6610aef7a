"""Every layout of ranks denoises as one rank does: real processes, a real FLUX transformer with random weights."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from distributed import scenarios
from distributed.ranks import run_ranks
from triton_diffusion.config import ParallelConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.layouts.checkpoint import build_checkpoint
from benchmarks.layouts.messages import Denoised, Row
from benchmarks.layouts.parity import LAYOUTS, ONE_RANK

pytestmark = pytest.mark.timeout(120)

EVEN, UNEVEN, TINY = (128, 128), (112, 144), (16, 32)
"""(height, width): 64 image tokens, which every layout divides; 63, which none does; 2, fewer than ranks."""
IMAGE_TOKENS, TEXT_TOKENS, CHANNELS = 64, 48, 64
NUM_HEADS, HEAD_DIM, NUM_DOUBLE, NUM_SINGLE = 4, 16, 1, 2
HIDDEN = NUM_HEADS * HEAD_DIM

# With predictions of 1, 3, 4 and 3: whenever a row joins or leaves, the cfg axis divides anew, and not evenly.
MIXED = (
    Row(seed=1, num_inference_steps=3),
    Row(seed=2, num_inference_steps=3, guidance_scale=3.0, joins_at=1),
    Row(seed=3, num_inference_steps=2, joins_at=2),
)
GUIDED = (Row(seed=4, num_inference_steps=3, guidance_scale=4.0),)
UNGUIDED = (Row(seed=5, num_inference_steps=3),)
NUM_TICKS = {MIXED: 4, GUIDED: 3, UNGUIDED: 3}
# One row ends in the last tick of the mixed batch, and two go on, of which one is guided.
LAST_TICK_SHARES = {1: [3], 2: [2, 1]}

Denoise = Callable[..., list[Denoised]]


@pytest.fixture(scope="module")
def denoise(tmp_path_factory: pytest.TempPathFactory) -> Denoise:
    """Denoise rows in a layout; what was asked before is not run again."""
    checkpoint = build_checkpoint(
        tmp_path_factory.mktemp("layouts") / "flux",
        num_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        num_layers=NUM_DOUBLE,
        num_single_layers=NUM_SINGLE,
    )

    @functools.cache
    def run(parallel: ParallelConfig, size: tuple[int, int], rows: tuple[Row, ...], dtype: str) -> list[Denoised]:
        num_ticks = NUM_TICKS[rows]
        given = {"folder": str(checkpoint), "size": size, "rows": list(rows), "num_ticks": num_ticks, "dtype": dtype}
        return run_ranks(scenarios.denoise, parallel, **given)

    return lambda parallel, size=EVEN, rows=MIXED, dtype="float32": run(parallel, size, rows, dtype)


def latents_of(answer: Denoised) -> NDArray[np.float32]:
    """Of all rows, one behind the other."""
    return np.concatenate([np.frombuffer(latents, np.float32) for latents in answer.latents])


def difference(answers: list[Denoised], expected: list[Denoised]) -> float:
    return float(np.abs(latents_of(answers[0]) - latents_of(expected[0])).max())


# Latents.


@pytest.mark.parametrize("size", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_batch_in_every_layout_comes_out_as_on_one_rank(
    denoise: Denoise, layout: str, size: tuple[int, int]
) -> None:
    answers = denoise(LAYOUTS[layout], size)
    assert len(answers) == LAYOUTS[layout].num_ranks
    assert difference(answers, denoise(ONE_RANK, size)) < 1e-5


@pytest.mark.parametrize("size", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_of_a_layout_hold_the_same_latents_to_the_bit(
    denoise: Denoise, layout: str, size: tuple[int, int]
) -> None:
    answers = denoise(LAYOUTS[layout], size)
    assert all(answer.latents == answers[0].latents for answer in answers)


@pytest.mark.parametrize("layout", ["u4", "r4", "u2r2"])
def test_a_picture_of_fewer_tokens_than_ranks_comes_out_as_on_one_rank(denoise: Denoise, layout: str) -> None:
    assert difference(denoise(LAYOUTS[layout], TINY), denoise(ONE_RANK, TINY)) < 1e-5


@pytest.mark.parametrize("rows", [GUIDED, UNGUIDED], ids=["guided", "unguided"])
def test_a_lone_row_over_the_cfg_axis_comes_out_as_on_one_rank(denoise: Denoise, rows: tuple[Row, ...]) -> None:
    """Guided, each rank has one prediction; not guided, the second rank has none."""
    answers = denoise(LAYOUTS["cfg2"], EVEN, rows)
    assert difference(answers, denoise(ONE_RANK, EVEN, rows)) < 1e-5
    assert answers[0].latents == answers[1].latents


def test_guidance_and_seed_show_in_the_latents(denoise: Denoise) -> None:
    """Otherwise the comparisons above would find no mistake in them."""
    rows = denoise(ONE_RANK)[0].latents
    guided = denoise(ONE_RANK, EVEN, GUIDED)[0].latents
    assert len({*rows, *guided}) == 4
    first, second = (np.frombuffer(latents, np.float32) for latents in (rows[0], rows[2]))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("layout", ["u2", "r2", "tp2", "cfg2"])
def test_bfloat16_over_ranks_is_hardly_further_from_float32_than_on_one(denoise: Denoise, layout: str) -> None:
    exact = latents_of(denoise(ONE_RANK)[0])

    def error(parallel: ParallelConfig) -> float:
        rounded = latents_of(denoise(parallel, EVEN, MIXED, "bfloat16")[0])
        return float(np.sqrt(np.mean((rounded - exact) ** 2)))

    assert 0 < error(LAYOUTS[layout]) <= 1.5 * error(ONE_RANK)


# Weights and traffic.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_tensor_parallelism_divides_the_weights(denoise: Denoise, layout: str) -> None:
    whole = denoise(ONE_RANK)[0].weight_bytes
    shares = [answer.weight_bytes / whole for answer in denoise(LAYOUTS[layout])]
    assert len(set(shares)) == 1
    assert (shares[0] < 1) == (LAYOUTS[layout].tp > 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_what_the_formulas_say(denoise: Denoise, layout: str) -> None:
    parallel = LAYOUTS[layout]
    shares = LAST_TICK_SHARES[parallel.cfg]
    per_part = parallel.num_ranks // parallel.cfg
    for rank, answer in enumerate(denoise(parallel)):
        expected = sent_bytes(parallel, own=shares[rank // per_part], longest=max(shares))
        assert answer.sent_bytes == expected, f"rank {rank}"


def sent_bytes(parallel: ParallelConfig, *, own: int, longest: int) -> dict[str, int]:
    """What a rank that makes `own` predictions sends in a step, in float32, where the sequence divides.

    Ulysses swaps query, key, value and output of its tokens, and keeps one part of u of each. The ring sends keys and
    values r - 1 times; behind Ulysses those are u times the tokens with 1 / u of the heads. A ring all-reduce sends
    2 (t - 1) / t of the tensor. What is gathered goes to each of the other ranks.
    """
    cfg, ring, ulysses, tp = parallel.cfg, parallel.ring, parallel.ulysses, parallel.tp
    tokens = own * (IMAGE_TOKENS + TEXT_TOKENS) // parallel.sequence
    attended = tokens * (HIDDEN // tp) * (NUM_DOUBLE + NUM_SINGLE)
    # Behind attention and feed-forward in both streams of a double block, once for both in a single one.
    summed = tokens * HIDDEN * (2 * NUM_DOUBLE + NUM_SINGLE)
    # Shift, scale and gate: six a stream of a double block, three a single block, shift and scale in front of the end.
    modulation = own * (HIDDEN // tp) * (2 * 6 * NUM_DOUBLE + 3 * NUM_SINGLE + 2)
    numbers = {
        "cfg": (cfg - 1) * longest * IMAGE_TOKENS * CHANNELS,
        "ring": (ring - 1) * 2 * attended,
        "ulysses": 4 * attended * (ulysses - 1) // ulysses,
        "tp": 2 * (tp - 1) * summed // tp + (tp - 1) * modulation,
    }
    gathered_over = "sequence" if ring > 1 and ulysses > 1 else "ring" if ring > 1 else "ulysses"
    gathered = (parallel.sequence - 1) * own * IMAGE_TOKENS // parallel.sequence * CHANNELS
    numbers[gathered_over] = numbers.get(gathered_over, 0) + gathered
    return {axis: 4 * number for axis, number in numbers.items() if number}
