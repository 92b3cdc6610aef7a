"""LTX-Video over several ranks: each layout against one rank, from text and from a picture, and its decoder's tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.ltx_video import build_ltx_condition_checkpoint, build_ltx_video_checkpoint
from checkpoints.requests import make_request
from checkpoints.stages import InProcessStages
from distributed.layouts import check_layout, denoise_alone
from distributed.ranks import run_ranks
from distributed.stage_scenarios import run_in_tiles
from triton_diffusion.config import ParallelConfig

SIZE: dict[str, Any] = {"height": 24, "width": 40, "num_frames": 5, "fps": 25.0, "max_sequence_length": 25}
"""45 tokens, which no even degree divides."""
TEXT = {
    "padded": make_request(**SIZE, prompt="x", num_inference_steps=2),
    "guided": make_request(**SIZE, num_inference_steps=3, guidance_scale=3.0, num_outputs=2),
}
PICTURE = {"picture": make_request(**SIZE, num_inference_steps=3, guidance_scale=2.0, num_images=1)}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
TILES = {
    "tile_sample_min_height": 24,
    "tile_sample_min_width": 24,
    "tile_sample_stride_height": 16,
    "tile_sample_stride_width": 16,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_ltx_video_checkpoint(tmp_path_factory.mktemp("ltx-video-layouts")))


@pytest.fixture(scope="module")
def stages(folder: str) -> InProcessStages:
    return InProcessStages(Path(folder))


@pytest.fixture(scope="module")
def blobs(stages: InProcessStages) -> dict[str, bytes]:
    text = {request_id: stages.encode(request_id, request) for request_id, request in TEXT.items()}
    picture = {request_id: stages.encode(request_id, request, [PIXELS]) for request_id, request in PICTURE.items()}
    return text | picture


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
    assert alone["results"].keys() == {*TEXT, *PICTURE}
    for answer in check_layout(folder, blobs, alone, parallel, weights_below=0.65):
        assert (answer["sent_bytes"] > 0) == (parallel.tp == 2)


@pytest.mark.parametrize("parallel", [ParallelConfig(cfg=2), ParallelConfig(tp=2, ulysses=2)], ids=str)
def test_ranks_add_the_same_noise_to_a_first_frame(tmp_path: Path, parallel: ParallelConfig) -> None:
    folder = build_ltx_condition_checkpoint(tmp_path)
    (request,) = PICTURE.values()
    blobs = {"picture": InProcessStages(folder).encode("picture", request, [PIXELS])}
    check_layout(str(folder), blobs, denoise_alone(str(folder), blobs), parallel, weights_below=0.65)


def test_tiles_are_shared_to_the_bit(folder: str, stages: InProcessStages) -> None:
    request = make_request(height=24, width=40, num_frames=5, fps=25.0, num_outputs=2, num_inference_steps=2)
    blob = stages.run("denoising", "video", stages.encode("video", request))
    arguments: dict[str, Any] = {"folder": folder, "blobs": {"video": blob}, "tiles": TILES}
    (one,) = run_ranks(run_in_tiles, ParallelConfig(), **arguments)
    both = run_ranks(run_in_tiles, ParallelConfig(), num_ranks=2, **arguments)
    assert np.array_equal(both[0]["video"]["videos"], one["video"]["videos"])
    untiled = stages.pictures(request).numpy()
    assert one["video"]["videos"].shape == untiled.shape == (2, 5, 24, 40, 3)
    assert np.abs(one["video"]["videos"] - untiled).max() > 1, "the frames have several tiles"
