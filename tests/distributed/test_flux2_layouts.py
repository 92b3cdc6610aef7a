"""FLUX.2-klein over several ranks: each layout against one rank, with pictures beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.flux2 import build_flux2_checkpoint, build_klein_checkpoint
from checkpoints.requests import make_blob, make_request
from checkpoints.stages import InProcessStages
from distributed.layouts import check_layout, denoise_alone, encode_on_two_ranks
from triton_diffusion.config import ParallelConfig
from triton_diffusion.request import GenerationRequest

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
    return denoise_alone(folder, blobs)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(ulysses=4), ParallelConfig(ring=2), ParallelConfig(tp=2), ParallelConfig(tp=2, ulysses=2)],
    ids=str,
)
def test_every_layout_draws_what_one_rank_does(
    folder: str, blobs: dict[str, bytes], alone: dict[str, Any], parallel: ParallelConfig
) -> None:
    check_layout(folder, blobs, alone, parallel, weights_below=0.75)


def test_qwen3_over_two_ranks_encodes_as_on_one(folder: str) -> None:
    check_text_encoder(folder, REQUESTS)


def test_mistral_over_two_ranks_encodes_as_on_one(tmp_path: Path) -> None:
    """Its weights have other names in the files than in the model."""
    request = make_request(prompt="two black cats", max_sequence_length=200)
    check_text_encoder(str(build_flux2_checkpoint(tmp_path)), {"r": request})


def check_text_encoder(folder: str, requests: dict[str, GenerationRequest]) -> None:
    """Assert that two ranks encode as one does, with little more than half of the weights each."""
    given = {request_id: make_blob(request_id, request) for request_id, request in requests.items()}
    one, answers = encode_on_two_ranks(folder, given)
    for tensors in one["results"].values():
        assert all(expected.std() > 0.1 for expected in tensors.values()), "there is something to get wrong"
    for answer in answers:
        share = answer["num_weights"]["text_encoder"] / one["num_weights"]["text_encoder"]
        print(f"{share:.3f} of the weights a rank")
        assert share < 0.6
