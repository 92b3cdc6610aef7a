"""Wan over several ranks: each layout against one rank, for each way in which pictures and experts change the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from checkpoints.requests import make_blob, make_request
from checkpoints.stages import InProcessStages, alone
from checkpoints.wan import BOUNDARY_RATIO, Kind, build_wan_checkpoint
from distributed.layouts import check_tiles
from distributed.ranks import run_ranks
from distributed.stage_scenarios import run_requests, run_stage
from triton_diffusion.config import ParallelConfig
from triton_diffusion.runtime.stage_loading import load_stage
from triton_diffusion.state import merge_tensors

U2, U4, R2, R3 = (ParallelConfig(ulysses=2), ParallelConfig(ulysses=4), ParallelConfig(ring=2), ParallelConfig(ring=3))
TP2, U2R2, TP2U2 = ParallelConfig(tp=2), ParallelConfig(ulysses=2, ring=2), ParallelConfig(tp=2, ulysses=2)

# Of TI2V 9 tokens, which 2 ranks do not divide; of the others 32, which 3 do not.
SIZES: dict[str, dict[str, int]] = {"ti2v": {"height": 16, "width": 48, "num_frames": 9}}
SIZE = {"height": 32, "width": 32, "num_frames": 5}
LAYOUTS: dict[Kind, list[ParallelConfig]] = {
    "experts": [U4, R3, TP2],
    "i2v": [U2R2, TP2U2],
    "ti2v": [U2, R2, TP2],
}


def pictures_of(kind: Kind) -> list[Any]:
    """One, random, where the checkpoint takes any."""
    picture = np.random.default_rng(0).integers(0, 255, (40, 24, 3), dtype=np.uint8)
    return [] if kind == "experts" else [picture]


class Checkpoint:
    """Requests that its text and image encoding have left, and what one rank draws of them."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder = str(build_wan_checkpoint(folder, kind))
        stages, pictures, size = InProcessStages(folder), pictures_of(kind), SIZES.get(kind, SIZE)
        common = {**size, "num_images": len(pictures), "max_sequence_length": 25}
        self.requests = {
            "plain": make_request(**common, prompt="x", num_inference_steps=2),
            "guided": make_request(**common, num_inference_steps=3, guidance_scale=3.0, num_outputs=2),
        }
        self.blobs = {name: stages.encode(name, request, pictures) for name, request in self.requests.items()}
        self.alone = self.run(ParallelConfig())[0]

    def run(self, parallel: ParallelConfig, stage_model: str = "denoising") -> list[dict[str, Any]]:
        """What each rank answers."""
        blobs = self.blobs
        if stage_model == "text_encoding":
            blobs = {name: make_blob(name, request) for name, request in self.requests.items()}
        return run_ranks(run_stage, parallel, folder=self.folder, stage_model=stage_model, blobs=blobs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Checkpoint]:
    """Of each kind, made when it is first asked for."""
    return functools.cache(lambda kind: Checkpoint(tmp_path_factory.mktemp(f"wan-{kind}"), kind))


@pytest.mark.parametrize(
    ("kind", "parallel"), [(kind, layout) for kind, layouts in LAYOUTS.items() for layout in layouts], ids=str
)
def test_every_layout_draws_what_one_rank_does(
    checkpoint: Callable[[Kind], Checkpoint], kind: Kind, parallel: ParallelConfig
) -> None:
    expected = checkpoint(kind).alone
    answers = checkpoint(kind).run(parallel)
    for name, tensors in expected["results"].items():
        error = np.abs(answers[0]["results"][name]["latents"] - tensors["latents"]).max()
        print(f"{name}: largest error {error:.2e} of {np.abs(tensors['latents']).max():.2f}")
        assert error < 1e-5
    for answer in answers:
        for component in {"transformer", "transformer_2"} & expected["num_weights"].keys():
            share = answer["num_weights"][component] / expected["num_weights"][component]
            assert (share < 0.75) == (parallel.tp > 1), share
        assert (answer["sent_bytes"] > 0) == (parallel.tp > 1)


def test_both_experts_have_rows_in_one_batch(checkpoint: Callable[[Kind], Checkpoint]) -> None:
    """Otherwise the layouts above would say nothing of the second."""
    experts = checkpoint("experts")
    stage = load_stage("denoising", experts.folder, alone(), dtype=torch.float32)
    timesteps = [
        stage.family.denoise.prepare_schedule(stage.components, request).timesteps[1]
        for request in experts.requests.values()
    ]
    boundary = BOUNDARY_RATIO * 1000
    assert min(timesteps) < boundary <= max(timesteps)


def test_umt5_over_two_ranks_encodes_as_on_one(checkpoint: Callable[[Kind], Checkpoint]) -> None:
    """Every block has a position bias of its own, with a column a head."""
    (one,) = checkpoint("experts").run(ParallelConfig(), "text_encoding")
    answers = checkpoint("experts").run(TP2, "text_encoding")
    for name, tensors in one["results"].items():
        for key, expected in tensors.items():
            assert np.abs(answers[0]["results"][name][key] - expected).max() < 1e-5
            assert expected.std() > 0.1, "there is something to get wrong"
    for answer in answers:
        assert answer["num_weights"]["text_encoder"] < 0.8 * one["num_weights"]["text_encoder"]


TILES = {"tile_sample_min_height": 16, "tile_sample_min_width": 16} | {
    "tile_sample_stride_height": 8,
    "tile_sample_stride_width": 8,
}


@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_tiles_of_a_video_go_through_all_their_frames_on_one_rank(
    checkpoint: Callable[[Kind], Checkpoint], kind: Kind
) -> None:
    """Each tile has a cache of the frames before, and is decoded frame by frame."""
    given = checkpoint(kind)
    request = given.requests["plain"]
    stage = load_stage("decoding", given.folder, alone(), dtype=torch.float32)
    shape = stage.family.decode.example_inputs(stage.components, request)["latents"].shape
    latents = {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    blobs = {"r": merge_tensors(save(latents, {}), make_blob("r", request))}
    one = check_tiles(given.folder, blobs, TILES, "decoding")["r"]["videos"]
    untiled = run_requests(stage, given.folder, "decoding", blobs)["r"]["videos"]
    assert one.shape == untiled.shape == (1, request.num_frames, request.height, request.width, 3)
    assert np.abs(one - untiled).max() > 1, "the frames have several tiles"


def test_a_first_frame_is_encoded_in_tiles_by_two_ranks_as_by_one(checkpoint: Callable[[Kind], Checkpoint]) -> None:
    """With gray frames behind it, and beside CLIP, which knows no tiles."""
    given = checkpoint("i2v")
    blobs = {"r": make_blob("r", given.requests["plain"], pictures_of("i2v"))}
    one = check_tiles(given.folder, blobs, TILES, "image_encoding")["r"]["condition"]
    untiled = load(given.blobs["plain"])["condition"].numpy()
    assert np.abs(one - untiled).max() > 1e-3, "there are several tiles"


def test_self_and_cross_attention_are_computed_by_the_backend_that_was_chosen(
    checkpoint: Callable[[Kind], Checkpoint],
) -> None:
    """Wan's processors hand the dispatcher nothing in cross attention, which then has to know the backend itself."""
    stage = load_stage("denoising", checkpoint("i2v").folder, alone(), dtype=torch.float32, attention_backend="flex")
    names = {
        path.split(".")[2]: str(processor._attention_backend.value)
        for path, processor in stage.components["transformer"].attn_processors.items()
    }
    assert names == {"attn1": "triton_diffusion", "attn2": "triton_diffusion_flex"}
