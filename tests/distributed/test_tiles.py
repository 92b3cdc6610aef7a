"""Pictures decoded in tiles by several ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints.requests import make_blob, make_request
from checkpoints.stages import alone
from distributed.layouts import check_tiles
from distributed.ranks import run_ranks
from distributed.scenarios import LATENT_CHANNELS, decode_in_tiles, make_vae
from distributed.stage_scenarios import run_requests
from triton_diffusion.config import ParallelConfig
from triton_diffusion.distributed.tiles import SharedTiles, deal_out, share_tiles
from triton_diffusion.runtime.stage_loading import load_stage

SHAPES = [(1, 16, 16), (1, 24, 40), (1, 40, 17), (2, 33, 20)]
"""(B, h, w) of latents: a picture that is one tile, wide and tall ones, a batch of two; tiles are 16 x 16 at most."""


@pytest.fixture(scope="module")
def on_one_rank() -> list[Any]:
    (pictures,) = run_ranks(decode_in_tiles, ParallelConfig(), shapes=SHAPES)
    return list(pictures)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_decode_to_the_bit_what_one_rank_does_in_the_same_tiles(num_ranks: int, on_one_rank: list[Any]) -> None:
    answers = run_ranks(decode_in_tiles, ParallelConfig(), num_ranks=num_ranks, shapes=SHAPES)
    for picture, expected, (batch, height, width) in zip(answers[0], on_one_rank, SHAPES, strict=True):
        assert picture.shape == (batch, 3, 2 * height, 2 * width)
        assert np.array_equal(picture, expected)


def test_pictures_of_several_tiles_are_not_those_of_one(on_one_rank: list[Any]) -> None:
    """Otherwise nothing was tiled."""
    vae = make_vae()
    for index, (batch, height, width) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(index)
        latents = torch.randn(batch, LATENT_CHANNELS, height, width, generator=generator)
        with torch.inference_mode():
            untiled = vae.decode(latents, return_dict=False)[0].numpy()
        is_one_tile = (height, width) == (16, 16)
        assert (np.abs(untiled - on_one_rank[index]).max() < 1e-5) == is_one_tile


def test_two_ranks_encode_a_given_picture_to_the_bit_as_one_does_in_the_same_tiles(flux_checkpoint: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    request = make_request(height=96, width=72, num_images=1, strength=0.5)
    blobs = {"r": make_blob("r", request, [picture])}
    one = check_tiles(str(flux_checkpoint), blobs, {}, "image_encoding")["r"]["initial_moments"]
    stage = load_stage("image_encoding", str(flux_checkpoint), alone(), dtype=torch.float32)
    untiled = run_requests(stage, str(flux_checkpoint), "image_encoding", blobs)["r"]["initial_moments"]
    assert one.shape == untiled.shape
    assert np.abs(one - untiled).max() > 1e-3, "there are several tiles"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_failure_stays_on_its_rank_and_the_next_picture_is_fine(num_ranks: int, on_one_rank: list[Any]) -> None:
    last = num_ranks - 1
    answers = run_ranks(decode_in_tiles, ParallelConfig(), num_ranks=num_ranks, shapes=SHAPES, fails_on={1: 0, 2: last})
    assert [answer[1] for answer in answers] == ["out of memory", *[None] * last]
    assert [answer[2] for answer in answers[1:]] == [*[None] * (last - 1), "out of memory"]
    for index in (0, 3):
        assert np.array_equal(answers[0][index], on_one_rank[index])


@pytest.mark.parametrize(
    ("tiling", "num_ranks", "is_shared"),
    [("auto", 1, False), ("auto", 2, True), ("on", 1, True), ("on", 2, True), ("off", 1, False), ("off", 2, False)],
)
def test_auto_tiles_where_several_ranks_can_share_them(tiling: Any, num_ranks: int, is_shared: bool) -> None:
    vae = make_vae()
    share_tiles(vae, SimpleNamespace(size=num_ranks), tiling)  # type: ignore[arg-type]
    assert vae.use_tiling == is_shared
    assert isinstance(vae.decoder, SharedTiles) == isinstance(vae.encoder, SharedTiles) == is_shared


# Who makes which tile.


def test_every_tile_goes_to_the_rank_with_least_to_do_the_largest_first() -> None:
    assert deal_out([4, 4, 2, 4, 4, 2], 2) == [0, 1, 0, 0, 1, 1]
    assert deal_out([1, 1, 5], 2) == [1, 1, 0]


def test_equal_tiles_are_dealt_out_in_turn() -> None:
    owners = deal_out([3] * 7, 3)
    assert sorted(owners.count(rank) for rank in range(3)) == [2, 2, 3]


def test_with_fewer_tiles_than_ranks_some_have_none() -> None:
    assert deal_out([9], 3) == [0]
    assert deal_out([], 2) == []
