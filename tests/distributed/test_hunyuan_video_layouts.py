"""HunyuanVideo over several ranks: each layout against one rank, and its autoencoder's tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.hunyuan_video import build_hunyuan_video_checkpoint
from checkpoints.requests import make_blob, make_request
from checkpoints.stages import InProcessStages
from distributed.layouts import check_layout, denoise_alone, encode_on_two_ranks
from distributed.ranks import run_ranks
from distributed.stage_scenarios import run_in_tiles
from triton_diffusion.config import ParallelConfig

SIZE: dict[str, Any] = {"height": 24, "width": 40, "num_frames": 9}
"""45 tokens of the video and 25 of the prompt, which no even degree divides."""
REQUESTS = {
    "padded": make_request(**SIZE, prompt="x", max_sequence_length=25, num_inference_steps=2),
    "guided": make_request(**SIZE, max_sequence_length=25, num_inference_steps=3, guidance_scale=3.0, num_outputs=2),
}
TILES = {
    "tile_sample_min_height": 24,
    "tile_sample_min_width": 24,
    "tile_sample_stride_height": 16,
    "tile_sample_stride_width": 16,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_hunyuan_video_checkpoint(tmp_path_factory.mktemp("hunyuan-video-layouts")))


@pytest.fixture(scope="module")
def stages(folder: str) -> InProcessStages:
    return InProcessStages(Path(folder))


@pytest.fixture(scope="module")
def blobs(stages: InProcessStages) -> dict[str, bytes]:
    return {request_id: stages.encode(request_id, request) for request_id, request in REQUESTS.items()}


@pytest.fixture(scope="module")
def alone(folder: str, blobs: dict[str, bytes]) -> dict[str, Any]:
    return denoise_alone(folder, blobs)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(ulysses=2),
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


def test_llama_over_two_ranks_encodes_as_on_one(folder: str, blobs: dict[str, bytes]) -> None:
    given = {request_id: make_blob(request_id, request) for request_id, request in REQUESTS.items()}
    one, answers = encode_on_two_ranks(folder, given)
    assert one["results"]["padded"]["prompt_embeds"].std() > 0.1, "there is something to get wrong"
    for answer in answers:
        assert answer["num_weights"]["text_encoder"] < one["num_weights"]["text_encoder"]
        assert answer["num_weights"]["text_encoder_2"] == one["num_weights"]["text_encoder_2"], "CLIP stays whole"


def test_tiles_in_space_and_time_are_shared_to_the_bit(folder: str, stages: InProcessStages) -> None:
    request = make_request(height=16, width=40, num_frames=21, num_outputs=2, num_inference_steps=1)
    blob = stages.run("denoising", "video", stages.encode("video", request))
    arguments: dict[str, Any] = {"folder": folder, "blobs": {"video": blob}, "tiles": TILES}
    (one,) = run_ranks(run_in_tiles, ParallelConfig(), **arguments)
    both = run_ranks(run_in_tiles, ParallelConfig(), num_ranks=2, **arguments)
    assert np.array_equal(both[0]["video"]["videos"], one["video"]["videos"])
    untiled = stages.pictures(request).numpy()
    assert one["video"]["videos"].shape == untiled.shape == (2, 21, 16, 40, 3)
    assert np.abs(one["video"]["videos"] - untiled).max() > 1, "the frames have several tiles"
