"""What the layout tests of all families ask: several ranks against one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distributed.ranks import run_ranks
from distributed.stage_scenarios import run_in_tiles, run_stage
from triton_diffusion.config import ParallelConfig


def denoise_alone(folder: str, blobs: dict[str, bytes]) -> dict[str, Any]:
    """What `run_stage` answers on one rank."""
    (answer,) = run_ranks(run_stage, ParallelConfig(), folder=folder, stage_model="denoising", blobs=blobs)
    return dict(answer)


def check_layout(
    folder: str, blobs: dict[str, bytes], alone: dict[str, Any], parallel: ParallelConfig, *, weights_below: float
) -> list[dict[str, Any]]:
    """Assert that ranks draw what one does, and that tensor parallelism, and it alone, divides the weights.

    weights_below: of a rank over the whole, at tp 2. Returns the answers of the ranks.
    """
    answers: list[dict[str, Any]] = run_ranks(run_stage, parallel, folder=folder, stage_model="denoising", blobs=blobs)
    for request_id, expected in alone["results"].items():
        error = np.abs(answers[0]["results"][request_id]["latents"] - expected["latents"]).max()
        print(f"{request_id}: largest error {error:.2e} of {np.abs(expected['latents']).max():.2f}")
        assert error < 1e-5
    for answer in answers:
        share = answer["num_weights"]["transformer"] / alone["num_weights"]["transformer"]
        assert (share < weights_below) == (parallel.tp == 2), share
    return answers


def check_tiles(
    folder: str, blobs: dict[str, bytes], tiles: dict[str, int], stage_model: str
) -> dict[str, dict[str, NDArray[Any]]]:
    """Assert that two ranks make of tiles, to the bit, what one does; returns that, by request id and name."""
    arguments: dict[str, Any] = {"folder": folder, "blobs": blobs, "tiles": tiles, "stage_model": stage_model}
    (one,) = run_ranks(run_in_tiles, ParallelConfig(), **arguments)
    both = run_ranks(run_in_tiles, ParallelConfig(), num_ranks=2, **arguments)
    for request_id, tensors in one.items():
        assert both[0][request_id].keys() == tensors.keys()
        for name, expected in tensors.items():
            assert np.array_equal(both[0][request_id][name], expected), name
    return dict(one)


def encode_on_two_ranks(folder: str, given: dict[str, bytes]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Assert that two ranks encode prompts as one does; returns the answers of the one and of the two."""
    arguments: dict[str, Any] = {"folder": folder, "stage_model": "text_encoding", "blobs": given}
    (one,) = run_ranks(run_stage, ParallelConfig(), **arguments)
    answers = run_ranks(run_stage, ParallelConfig(tp=2), **arguments)
    for request_id, tensors in one["results"].items():
        for name, expected in tensors.items():
            assert np.abs(answers[0]["results"][request_id][name] - expected).max() < 1e-5, name
    return one, answers
