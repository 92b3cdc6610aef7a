"""Qwen-Image over several ranks: each layout against one rank, with prompts of several lengths in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from checkpoints.qwen_image import LATENT_CHANNELS, build_qwen_image_checkpoint
from checkpoints.requests import make_blob, make_request
from checkpoints.stages import InProcessStages
from distributed.layouts import encode_on_two_ranks
from distributed.ranks import run_ranks
from distributed.stage_scenarios import run_in_tiles, run_stage
from triton_diffusion.config import ParallelConfig
from triton_diffusion.state import merge_tensors

U2, R2, TP2, CFG2 = (ParallelConfig(ulysses=2), ParallelConfig(ring=2), ParallelConfig(tp=2), ParallelConfig(cfg=2))
U2R2, TP2U2 = ParallelConfig(ulysses=2, ring=2), ParallelConfig(tp=2, ulysses=2)
SIZE = {"height": 20, "width": 28}
"""35 tokens of the picture, which no even degree divides."""
REQUESTS = {
    "plain": make_request(**SIZE, prompt="x", num_inference_steps=2),
    "guided": make_request(
        **SIZE,
        prompt="two black cats sleep under an old table",
        negative_prompt="blurry dark",
        num_inference_steps=3,
        guidance_scale=3.0,
        seed=2,
    ),
}
TEXT_TOKENS = {"prompt_embeds": 13, "negative.prompt_embeds": 7}
"""Of the guided request: no even degree divides them, either."""


class Checkpoint:
    """Requests that are encoded, and what one rank draws of them."""

    def __init__(self, folder: Path, pipeline_class: str, **values: Any) -> None:
        self.folder = str(build_qwen_image_checkpoint(folder, pipeline_class, **values))
        stages = InProcessStages(folder)
        self.blobs = {name: stages.encode(name, request) for name, request in REQUESTS.items()}
        if pipeline_class != "QwenImagePipeline":
            # Of a picture of another size, 15 tokens; to encode one of a million pixels would take long.
            pictures = {
                name: torch.randn(1, LATENT_CHANNELS, 6, 10, generator=torch.Generator().manual_seed(seed))
                for seed, name in enumerate(REQUESTS)
            }
            self.blobs = {
                name: merge_tensors(save({"image_latents_0": pictures[name]}, {}), blob)
                for name, blob in self.blobs.items()
            }
        self.alone = self.run(ParallelConfig())[0]

    def run(self, parallel: ParallelConfig) -> list[dict[str, Any]]:
        """What each rank answers."""
        return run_ranks(run_stage, parallel, folder=self.folder, stage_model="denoising", blobs=self.blobs)

    def check(self, parallel: ParallelConfig) -> None:
        """Assert that a layout draws what one rank does, and divides the weights if it should."""
        answers = self.run(parallel)
        for name, expected in self.alone["results"].items():
            error = np.abs(answers[0]["results"][name]["latents"] - expected["latents"]).max()
            print(f"{name}: largest error {error:.2e} of {np.abs(expected['latents']).max():.2f}")
            assert error < 1e-5
        for answer in answers:
            share = answer["num_weights"]["transformer"] / self.alone["num_weights"]["transformer"]
            assert (share < 0.75) == (parallel.tp == 2), share


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("qwen-layouts"), "QwenImagePipeline")


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("qwen-edit-layouts")
    return Checkpoint(folder, "QwenImageEditPlusPipeline", zero_cond_t=True, num_heads=4)


@pytest.mark.parametrize("parallel", [U2, R2, TP2, CFG2, U2R2], ids=str)
def test_every_layout_draws_what_one_rank_does(qwen: Checkpoint, parallel: ParallelConfig) -> None:
    guided = load(qwen.blobs["guided"])
    assert {name: tensor.shape[1] for name, tensor in guided.items()} == TEXT_TOKENS
    qwen.check(parallel)


@pytest.mark.parametrize("parallel", [U2R2, TP2U2], ids=str)
def test_pictures_at_noise_level_zero_are_seen_in_every_layout(edit: Checkpoint, parallel: ParallelConfig) -> None:
    """Each token of the sequence is modulated by one of two timesteps, which are cut with it."""
    edit.check(parallel)


def test_qwen_vl_over_two_ranks_encodes_words_and_pictures_as_on_one(edit: Checkpoint) -> None:
    """Its weights have other names in the files than in the model."""
    picture = np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)
    request = make_request(**SIZE, prompt="a cat", negative_prompt="dark", guidance_scale=3.0, num_images=1)
    one, answers = encode_on_two_ranks(edit.folder, {"r": make_blob("r", request, [picture])})
    assert one["results"]["r"]["prompt_embeds"].std() > 0.1, "there is something to get wrong"
    for answer in answers:
        share = answer["num_weights"]["text_encoder"] / one["num_weights"]["text_encoder"]
        print(f"{share:.3f} of the weights a rank")
        # What cuts a picture into patches stays whole, and is large beside so small a model.
        assert share < 0.7


def test_tiles_on_two_ranks_come_out_as_on_one(qwen: Checkpoint) -> None:
    """The decoder is handed a cache that it writes to, for the frames of a video; a tile of a picture starts anew."""
    sides = ("height", "width")
    tiles = {f"tile_sample_min_{side}": 16 for side in sides} | {f"tile_sample_stride_{side}": 12 for side in sides}
    stages = InProcessStages(Path(qwen.folder))
    request = make_request(height=32, width=20, num_inference_steps=2)
    blobs = {"r": stages.run("denoising", "r", stages.encode("r", request))}
    arguments: dict[str, Any] = {"folder": qwen.folder, "blobs": blobs, "tiles": tiles}
    (alone,) = run_ranks(run_in_tiles, ParallelConfig(), **arguments)
    answers = run_ranks(run_in_tiles, ParallelConfig(), num_ranks=2, **arguments)
    assert np.array_equal(answers[0]["r"]["pictures"], alone["r"]["pictures"])
    assert not np.array_equal(alone["r"]["pictures"], stages.pictures(request)), "there are several tiles"
