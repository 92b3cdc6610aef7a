"""FLUX.2-klein over several ranks: each layout against one rank, with pictures beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.flux2 import build_klein_checkpoint
from checkpoints.requests import make_blob, make_request
from checkpoints.stages import InProcessStages
from distributed.ranks import run_ranks
from distributed.stage_scenarios import run_stage
from triton_diffusion.config import ParallelConfig

SIZE: dict[str, Any] = {"height": 20, "width": 28, "max_sequence_length": 45, "num_images": 1}
"""35 tokens that are drawn, 272 of the picture beside, and 45 of the prompt."""
REQUESTS = {
    "plain": make_request(**SIZE, num_inference_steps=2),
    "guided": make_request(**SIZE, num_inference_steps=3, guidance_scale=3.0, num_outputs=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_klein_checkpoint(tmp_path_factory.mktemp("klein-layouts")))


@pytest.fixture(scope="module")
def blobs(folder: str) -> dict[str, bytes]:
    stages, picture = InProcessStages(Path(folder)), np.random.default_rng(0).integers(0, 256, (64, 70, 3), np.uint8)
    return {request_id: stages.encode(request_id, request, [picture]) for request_id, request in REQUESTS.items()}


@pytest.fixture(scope="module")
def alone(folder: str, blobs: dict[str, bytes]) -> dict[str, Any]:
    (answer,) = run_ranks(run_stage, ParallelConfig(), folder=folder, stage_model="denoising", blobs=blobs)
    return dict(answer)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(ulysses=4), ParallelConfig(ring=2), ParallelConfig(tp=2), ParallelConfig(tp=2, ulysses=2)],
    ids=str,
)
def test_every_layout_draws_what_one_rank_does(
    folder: str, blobs: dict[str, bytes], alone: dict[str, Any], parallel: ParallelConfig
) -> None:
    answers = run_ranks(run_stage, parallel, folder=folder, stage_model="denoising", blobs=blobs)
    for request_id, expected in alone["results"].items():
        error = np.abs(answers[0]["results"][request_id]["latents"] - expected["latents"]).max()
        print(f"{request_id}: largest error {error:.2e} of {np.abs(expected['latents']).max():.2f}")
        assert error < 1e-5
    for answer in answers:
        share = answer["num_weights"]["transformer"] / alone["num_weights"]["transformer"]
        assert (share < 0.75) == (parallel.tp == 2), share


def test_qwen3_over_two_ranks_encodes_as_on_one(folder: str) -> None:
    given = {request_id: make_blob(request_id, request) for request_id, request in REQUESTS.items()}
    arguments: dict[str, Any] = {"folder": folder, "stage_model": "text_encoding", "blobs": given}
    (one,) = run_ranks(run_stage, ParallelConfig(), **arguments)
    answers = run_ranks(run_stage, ParallelConfig(tp=2), **arguments)
    for request_id, tensors in one["results"].items():
        for name, expected in tensors.items():
            assert np.abs(answers[0]["results"][request_id][name] - expected).max() < 1e-5, name
            assert expected.std() > 0.1, "there is something to get wrong"
    for answer in answers:
        assert answer["num_weights"]["text_encoder"] < 0.75 * one["num_weights"]["text_encoder"]
