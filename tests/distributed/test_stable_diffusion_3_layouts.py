"""Stable Diffusion 3.5 over several ranks: each layout against one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints.requests import make_blob, make_request
from checkpoints.stable_diffusion_3 import build_stable_diffusion_3_checkpoint
from checkpoints.stages import InProcessStages
from distributed.layouts import check_layout, denoise_alone, encode_on_two_ranks
from triton_diffusion.config import ParallelConfig

SIZE: dict[str, Any] = {"height": 20, "width": 44, "max_sequence_length": 25}
"""55 tokens of the picture and 45 of the prompt, which no even degree divides."""
REQUESTS = {
    "plain": make_request(**SIZE, prompt="x", num_inference_steps=2),
    "guided": make_request(**SIZE, num_inference_steps=3, guidance_scale=3.0, num_outputs=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_stable_diffusion_3_checkpoint(tmp_path_factory.mktemp("sd3-layouts"), is_3_5=True))


@pytest.fixture(scope="module")
def blobs(folder: str) -> dict[str, bytes]:
    stages = InProcessStages(Path(folder))
    return {request_id: stages.encode(request_id, request) for request_id, request in REQUESTS.items()}


@pytest.fixture(scope="module")
def alone(folder: str, blobs: dict[str, bytes]) -> dict[str, Any]:
    return denoise_alone(folder, blobs)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(ulysses=2),
        ParallelConfig(ulysses=4),
        ParallelConfig(ring=2),
        ParallelConfig(tp=2),
        ParallelConfig(ring=2, ulysses=2),
        ParallelConfig(tp=2, ulysses=2),
    ],
    ids=str,
)
def test_every_layout_draws_what_one_rank_does(
    folder: str, blobs: dict[str, bytes], alone: dict[str, Any], parallel: ParallelConfig
) -> None:
    for answer in check_layout(folder, blobs, alone, parallel, weights_below=0.75):
        assert (answer["sent_bytes"] > 0) == (parallel.tp == 2)


def test_t5_over_two_ranks_encodes_as_on_one(folder: str) -> None:
    given = {request_id: make_blob(request_id, request) for request_id, request in REQUESTS.items()}
    one, answers = encode_on_two_ranks(folder, given)
    assert one["results"]["plain"]["prompt_embeds"].std() > 0.1, "there is something to get wrong"
    for answer in answers:
        assert answer["num_weights"]["text_encoder_3"] < 0.75 * one["num_weights"]["text_encoder_3"]
        assert answer["num_weights"]["text_encoder"] == one["num_weights"]["text_encoder"], "the CLIPs stay whole"
