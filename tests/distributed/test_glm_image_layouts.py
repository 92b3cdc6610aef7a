"""GLM-Image's transformer over real ranks: padded text, condition pictures, lengths that do not divide."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.glm_image import build_glm_image_checkpoint
from distributed.glm_image import Array, predict
from distributed.ranks import run_ranks
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.glm_image.family import FAMILY
from triton_diffusion.loading.checkpoint import open_checkpoint

EVEN: dict[str, Any] = {"size": (4, 4), "text_lengths": [8, 8, 8, 8], "pictures": [(4, 4), (2, 4)]}
UNEVEN: dict[str, Any] = {"size": (3, 5), "text_lengths": [7, 1, 3], "pictures": [(3, 3), (1, 5), (2, 4)]}
"""The second picture and the first are both odd: together they would divide."""
CASES = {"even": EVEN, "uneven": UNEVEN}
LAYOUTS = {
    "u2": ParallelConfig(ulysses=2),
    "r2": ParallelConfig(ring=2),
    "tp2": ParallelConfig(tp=2),
    "u2r2": ParallelConfig(ulysses=2, ring=2),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_glm_image_checkpoint(tmp_path_factory.mktemp("layouts") / "glm_image")


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Callable[[ParallelConfig, str], list[Array]]:
    @functools.cache
    def run(parallel: ParallelConfig, case: str) -> list[Array]:
        return run_ranks(predict, parallel, folder=str(checkpoint), **CASES[case])

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictions_of_a_layout_are_those_of_one_rank(
    run: Callable[[ParallelConfig, str], list[Array]], layout: str, case: str
) -> None:
    (expected,) = run(ParallelConfig(), case)
    answers = run(LAYOUTS[layout], case)
    for answer in answers:
        error = np.abs(answer - expected).max()
        print(f"largest error {error:.2e} of {np.abs(expected).max():.2f}")
        assert error < 1e-5
        assert np.array_equal(answer, answers[0])


def test_pictures_show_in_conditional_predictions_alone(run: Callable[[ParallelConfig, str], list[Array]]) -> None:
    """Otherwise the comparison above would find no mistake in them."""
    (answer,) = run(ParallelConfig(), "even")
    with_pictures, without = answer
    changed = np.abs(with_pictures - without).reshape(4, -1).max(1)
    assert (changed[:2] > 1e-2).all()
    assert (changed[2:] < 1e-6).all()


def test_degrees_that_do_not_divide_the_heads_are_refused(checkpoint: Path) -> None:
    opened = open_checkpoint(str(checkpoint))
    with pytest.raises(ConfigurationError, match="tp_size=3 does not divide num_attention_heads=4; use 1, 2, 4"):
        FAMILY.check_parallel("denoising", opened, ParallelConfig(tp=3))
    FAMILY.check_parallel("text_encoding", opened, ParallelConfig(tp=2))
    with pytest.raises(ConfigurationError, match="num_heads=2"):
        FAMILY.check_parallel("text_encoding", opened, ParallelConfig(tp=4))
