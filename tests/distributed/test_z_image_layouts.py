"""Z-Image's transformer over real ranks: rows whose sequences differ in length, and degrees that do not divide them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.requests import make_blob, make_request
from checkpoints.z_image import build_z_image_checkpoint
from distributed.layouts import encode_on_two_ranks
from distributed.ranks import run_ranks
from distributed.z_image import Array, predict
from triton_diffusion.config import ParallelConfig

CASES: dict[str, dict[str, Any]] = {
    "equal": {"size": (4, 8), "text_lengths": [20, 32]},
    "different": {"size": (5, 3), "text_lengths": [40, 7, 70]},
    "longer": {"size": (5, 3), "text_lengths": [41, 7, 70]},
}
"""The transformer fills up 20 tokens of text to 32."""
LAYOUTS = {
    "u2": ParallelConfig(ulysses=2),
    "r2": ParallelConfig(ring=2),
    "r3": ParallelConfig(ring=3),
    "tp2": ParallelConfig(tp=2),
    "u2r2": ParallelConfig(ulysses=2, ring=2),
}

Run = Callable[[ParallelConfig, str], list[Array]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = build_z_image_checkpoint(tmp_path_factory.mktemp("layouts") / "z_image")

    @functools.cache
    def run(parallel: ParallelConfig, case: str) -> list[Array]:
        return run_ranks(predict, parallel, folder=str(folder), **CASES[case])

    return run


@pytest.mark.parametrize("case", ["equal", "different"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictions_of_a_layout_are_those_of_one_rank(run: Run, layout: str, case: str) -> None:
    """64 and 128 tokens do not divide by 3."""
    (expected,) = run(ParallelConfig(), case)
    answers = run(LAYOUTS[layout], case)
    for answer in answers:
        error = np.abs(answer - expected).max()
        print(f"largest error {error:.2e} of {np.abs(expected).max():.2f}")
        assert error < 1e-5
        assert np.array_equal(answer, answers[0])


def test_the_length_of_a_text_shows_in_its_row_alone(run: Run) -> None:
    """Otherwise the comparison above would find no mistake in the mask."""
    (before,), (behind,) = run(ParallelConfig(), "different"), run(ParallelConfig(), "longer")
    changed = np.abs(behind - before).reshape(3, -1).max(1)
    assert changed[0] > 1e-3
    assert (changed[1:] < 1e-5).all()


def test_qwen3_over_two_ranks_encodes_as_on_one(tmp_path: Path) -> None:
    request = make_request(prompt="two black cats")
    one, answers = encode_on_two_ranks(
        str(build_z_image_checkpoint(tmp_path / "z_image")), {"r": make_blob("r", request)}
    )
    assert one["results"]["r"]["prompt_embeds"].std() > 0.1, "there is something to get wrong"
    for answer in answers:
        assert answer["num_weights"]["text_encoder"] < 0.6 * one["num_weights"]["text_encoder"]
