"""HunyuanVideo from pictures over several ranks: each layout against one rank, LLaVA, and the picture in tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load

from checkpoints.hunyuan_video import ImageCondition, build_hunyuan_image_to_video_checkpoint
from checkpoints.requests import make_blob, make_request
from checkpoints.stages import InProcessStages
from distributed.layouts import check_layout, check_tiles, denoise_alone, encode_on_two_ranks
from triton_diffusion.config import ParallelConfig

COMMON: dict[str, Any] = {"height": 24, "width": 40, "num_frames": 9, "num_images": 1, "max_sequence_length": 25}
"""45 tokens of the video, 15 of them of its first frame: of four ranks the first has 12, the second 3, others none."""
REQUESTS = {
    "plain": make_request(**COMMON, prompt="x", num_inference_steps=2),
    "guided": make_request(**COMMON, num_inference_steps=3, guidance_scale=3.0, num_outputs=2),
}
PICTURE = np.random.default_rng(0).integers(0, 255, (40, 24, 3), dtype=np.uint8)
LAYOUTS: list[tuple[ImageCondition, ParallelConfig]] = [
    ("latent_concat", ParallelConfig(ulysses=2)),
    ("token_replace", ParallelConfig(ring=2, ulysses=2)),
    ("token_replace", ParallelConfig(tp=2, ulysses=2)),
    ("token_replace", ParallelConfig(cfg=2)),
]


class Checkpoint:
    """Requests that their pictures and prompts are encoded of, and what one rank draws of them."""

    def __init__(self, folder: Path, kind: ImageCondition) -> None:
        self.folder = str(build_hunyuan_image_to_video_checkpoint(folder, kind))
        stages = InProcessStages(folder)
        self.blobs = {name: stages.encode(name, request, [PICTURE]) for name, request in REQUESTS.items()}
        self.alone = denoise_alone(self.folder, self.blobs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ImageCondition], Checkpoint]:
    """Of each kind, made when it is first asked for."""
    return functools.cache(lambda kind: Checkpoint(tmp_path_factory.mktemp(kind), kind))


@pytest.mark.parametrize(("kind", "parallel"), LAYOUTS, ids=str)
def test_every_layout_draws_what_one_rank_does(
    checkpoint: Callable[[ImageCondition], Checkpoint], kind: ImageCondition, parallel: ParallelConfig
) -> None:
    given = checkpoint(kind)
    check_layout(given.folder, given.blobs, given.alone, parallel, weights_below=0.75)


def test_llava_over_two_ranks_reads_words_and_pictures_as_on_one(
    checkpoint: Callable[[ImageCondition], Checkpoint],
) -> None:
    given = {name: make_blob(name, request, [PICTURE]) for name, request in REQUESTS.items()}
    one, answers = encode_on_two_ranks(checkpoint("token_replace").folder, given)
    assert one["results"]["plain"]["prompt_embeds"].std() > 0.1, "there is something to get wrong"
    for answer in answers:
        share = answer["num_weights"]["text_encoder"] / one["num_weights"]["text_encoder"]
        print(f"{share:.3f} of the weights a rank")
        # Places and patches of the picture stay whole, and are large beside so small a model.
        assert share < 0.7
        assert answer["num_weights"]["text_encoder_2"] == one["num_weights"]["text_encoder_2"], "CLIP stays whole"


def test_a_picture_is_encoded_in_tiles_by_two_ranks_as_by_one(
    checkpoint: Callable[[ImageCondition], Checkpoint],
) -> None:
    given = checkpoint("token_replace")
    sides = ("height", "width")
    tiles = {f"tile_sample_min_{side}": 24 for side in sides} | {f"tile_sample_stride_{side}": 16 for side in sides}
    blobs = {"r": make_blob("r", REQUESTS["plain"], [PICTURE])}
    one = check_tiles(given.folder, blobs, tiles, "image_encoding")["r"]["image_latents"]
    untiled = load(given.blobs["plain"])["image_latents"].numpy()
    assert np.abs(one - untiled).max() > 1e-3, "there are several tiles"
