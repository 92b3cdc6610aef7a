"""Our stages against diffusers' LTXPipeline and LTXImageToVideoPipeline on the same weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from PIL import Image
from safetensors.torch import load

from checkpoints.ltx_video import build_ltx_video_checkpoint
from checkpoints.ltx_video_pair import LtxPair, make_request
from checkpoints.parity import Pair, assert_close, differs, guided_arguments
from checkpoints.stages import InProcessStages, Picture
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.families.ltx_video import FAMILY
from triton_diffusion.loading.checkpoint import Checkpoint, open_checkpoint
from triton_diffusion.request import GenerationRequest
from triton_diffusion.state import read_state

LONG_PROMPT = "the small green square stands left of a large yellow triangle, " * 6
PICTURES = [
    np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    for seed, size in enumerate([(32, 32, 3), (50, 21, 3)])
]


def arguments(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    given = guided_arguments(request, videos=True) | {"frame_rate": request.fps}
    # With a generator for each output, the pipeline wants a picture for each as well.
    return given | ({"image": images * request.num_outputs} if images else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_ltx_video_checkpoint(tmp_path_factory.mktemp("ltx-video"))


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return LtxPair(folder, LTXPipeline, arguments)


@pytest.fixture(scope="module")
def image_pair(folder: Path) -> Pair:
    """The same checkpoint, with a picture."""
    return LtxPair(folder, LTXImageToVideoPipeline, arguments)


@pytest.fixture(scope="module")
def plain(pair: Pair) -> torch.Tensor:
    """The latents of make_request()."""
    return pair.check_latents(make_request())


# Latents and videos.


@pytest.mark.parametrize(
    ("height", "width", "num_frames", "steps"), [(32, 32, 1, 2), (32, 96, 3, 3), (64, 32, 9, 4), (96, 64, 5, 2)]
)
def test_latents_equal_the_pipelines_at_every_size_length_and_step_count(
    pair: Pair, height: int, width: int, num_frames: int, steps: int
) -> None:
    pair.check_latents(make_request(height=height, width=width, num_frames=num_frames, num_inference_steps=steps))


@pytest.mark.parametrize("num_frames", [3, 9])
def test_frames_are_within_one_of_the_pipelines(pair: Pair, num_frames: int) -> None:
    video = pair.check_pictures(make_request(width=64, num_frames=num_frames, num_outputs=2)).float()
    assert video.shape == (2, num_frames, 32, 64, 3)
    assert (video[:, 0] - video[:, -1]).abs().mean() > 5, "frames differ"


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_latents_equal_the_pipelines_for_every_seed(pair: Pair, plain: torch.Tensor, seed: int) -> None:
    assert differs(pair.check_latents(make_request(seed=seed)), plain)


def test_outputs_equal_the_pipelines_with_one_generator_each(pair: Pair) -> None:
    latents = pair.check_latents(make_request(num_outputs=2, guidance_scale=2.0, negative_prompt="dark"))
    assert differs(latents[0], latents[1])


@pytest.mark.parametrize("fps", [8.0, 50.0])
def test_the_frame_rate_is_the_pipelines(pair: Pair, plain: torch.Tensor, fps: float) -> None:
    assert differs(pair.check_latents(make_request(fps=fps)), plain)


def test_a_frame_rate_that_is_left_open_is_the_default(pair: Pair, plain: torch.Tensor) -> None:
    assert torch.equal(pair.stages.latents(make_request(fps=0.0)), plain)


# Text.


@pytest.mark.parametrize("prompt", ["x", "ein blauer Würfel 蓝色", "  two  black\tcats \n"])
def test_latents_equal_the_pipelines_for_every_prompt(pair: Pair, plain: torch.Tensor, prompt: str) -> None:
    assert differs(pair.check_latents(make_request(prompt=prompt)), plain)


@pytest.mark.parametrize("max_sequence_length", [1, 5, 48, 128])
def test_max_sequence_length_is_followed(pair: Pair, plain: torch.Tensor, max_sequence_length: int) -> None:
    assert differs(pair.check_latents(make_request(max_sequence_length=max_sequence_length)), plain)


def test_a_prompt_that_is_too_long_is_cut_as_in_the_pipeline_and_leaves_a_warning(pair: Pair) -> None:
    request = make_request(prompt=LONG_PROMPT, max_sequence_length=16)
    cut = pair.check_latents(request)
    assert differs(cut, pair.check_latents(replace(request, max_sequence_length=128)))
    (warning,) = read_state(pair.stages.encode("r", request)).warnings
    num_tokens = len(pair.pipeline.tokenizer(LONG_PROMPT).input_ids)
    assert f"{num_tokens} tokens and was cut to max_sequence_length=16" in warning


# Guidance.


@pytest.mark.parametrize("negative_prompt", ["blurry, dark, low quality", ""])
def test_guidance_scale_and_negative_prompt_are_the_pipelines(
    pair: Pair, plain: torch.Tensor, negative_prompt: str
) -> None:
    assert differs(pair.check_latents(make_request(guidance_scale=4.0, negative_prompt=negative_prompt)), plain)


# Schedules.


def test_a_single_step_is_refused_where_the_schedule_must_not_end_at_its_start(pair: Pair) -> None:
    """The pipeline divides zero by zero there."""
    with pytest.raises(InvalidRequestError, match=r"num_inference_steps=1 must be at least 2 .* sigma 0\.1$"):
        pair.stages.latents(make_request(num_inference_steps=1))


def test_a_static_shift_equals_the_pipelines_and_can_be_replaced(tmp_path: Path, plain: torch.Tensor) -> None:
    pair = LtxPair(build_ltx_video_checkpoint(tmp_path / "static", dynamic_shift=False), LTXPipeline, arguments)
    own = pair.check_latents(make_request())
    assert differs(own, plain)
    pair.check_latents(make_request(num_inference_steps=1))
    request = make_request(flow_shift=5.0)
    drawn = pair.stages.latents(request)
    scheduler = pair.pipeline.scheduler
    pair.pipeline.scheduler = type(scheduler).from_config(scheduler.config, shift=5.0)
    assert_close(drawn, pair.reference(request))
    assert differs(drawn, own)
    assert FAMILY.defaults(pair.stages.checkpoint).flow_shift == 2.0


# Decoders that take a timestep.


def test_a_decoder_with_timestep_and_noise_draws_the_pipelines_frames(tmp_path: Path) -> None:
    """The pipeline takes the decoder's noise from torch's global generator, which is to start where ours does."""
    pair = LtxPair(build_ltx_video_checkpoint(tmp_path / "0.9.1", timestep_conditioning=True), LTXPipeline, arguments)
    assert pair.pipeline.vae.decoder.time_embedder is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        video = pair.check_pictures(make_request())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with pytest.raises(AssertionError):
            pair.check_pictures(make_request())
    assert torch.equal(pair.stages.pictures(make_request()), video), "it is the same every time"
    two = pair.stages.pictures(make_request(num_outputs=2))
    assert (two[:1].int() - video.int()).abs().max() <= 1, "and beside others"


# A picture to start from.


@pytest.mark.parametrize(("index", "width", "num_frames"), [(0, 32, 5), (1, 64, 9), (1, 32, 1)])
def test_a_picture_becomes_the_first_frame_as_in_the_pipeline(
    image_pair: Pair, pair: Pair, index: int, width: int, num_frames: int
) -> None:
    request = make_request(width=width, num_frames=num_frames, num_images=1)
    drawn = image_pair.check_latents(request, [PICTURES[index]])
    assert differs(drawn, image_pair.stages.latents(request, images=[255 - PICTURES[index]]))
    assert differs(drawn, pair.stages.latents(replace(request, num_images=0)))


def test_guided_outputs_of_a_picture_equal_the_pipelines(image_pair: Pair) -> None:
    request = make_request(num_images=1, guidance_scale=3.0, negative_prompt="dark", num_outputs=2)
    latents = image_pair.check_latents(request, PICTURES[:1])
    assert differs(latents[0], latents[1])
    assert differs(latents[:1, :, :1], latents[1:, :, :1]), "the first frame is sampled, too"


def test_frames_behind_a_picture_are_within_one_of_the_pipelines(image_pair: Pair) -> None:
    image_pair.check_pictures(make_request(num_images=1), PICTURES[1:])


def test_a_checkpoint_of_the_image_pipeline_demands_a_picture(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = build_ltx_video_checkpoint(tmp_path / "image", image_to_video=True)
    defaults = FAMILY.defaults(open_checkpoint(str(folder)))
    assert (defaults.min_images, defaults.max_images) == (1, 1)
    assert replace(defaults, min_images=0) == FAMILY.defaults(checkpoint)
    LtxPair(folder, LTXImageToVideoPipeline, arguments).check_latents(make_request(num_images=1), PICTURES[:1])


# Batches of rows at different steps.


def test_rows_at_different_steps_are_drawn_as_they_are_alone(pair: Pair) -> None:
    pair.check_batch(
        {
            "first": make_request(num_inference_steps=4, seed=1),
            "guided": make_request(num_inference_steps=2, seed=2, prompt="x", guidance_scale=3.0, num_outputs=2),
            "late": make_request(num_inference_steps=3, seed=3, prompt=LONG_PROMPT),
        },
        {"first": 0, "guided": 1, "late": 2},
    )


def test_rows_with_pictures_at_different_steps_are_drawn_as_they_are_alone(image_pair: Pair) -> None:
    image_pair.check_batch(
        {
            "first": make_request(num_inference_steps=3, seed=1, num_images=1),
            "guided": make_request(num_inference_steps=2, seed=2, num_images=1, guidance_scale=3.0),
        },
        {"first": 0, "guided": 1},
        {"first": PICTURES[:1], "guided": PICTURES[1:]},
    )


def test_rows_share_a_batch_only_with_those_of_their_frame_rate_and_kind(image_pair: Pair) -> None:
    keys = []
    for request in (make_request(), make_request(fps=8.0), make_request(seed=1), make_request(num_images=1)):
        blob = image_pair.stages.encode("r", request, PICTURES[: request.num_images])
        keys.append(FAMILY.batch_key("denoising", request, read_state(blob).tensor_infos))
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("images", [[], PICTURES[:1]], ids=["from text", "from a picture"])
def test_a_preview_is_one_frame_that_is_not_given(pair: Pair, images: list[Picture]) -> None:
    request = make_request(num_inference_steps=3, preview_interval=2, num_images=len(images))
    pair.stages.admit("denoising", "watched", pair.stages.encode("watched", request, images))
    (_, done, _) = (pair.stages.tick("denoising", [("watched", 0)]) for _ in range(3))
    estimate = load(done.previews["watched"])["latents"]
    final = pair.stages.latents(request, images=images)
    assert not torch.equal(estimate, final[:, :, :1])
    preview = load(pair.stages.run("decoding", "preview", done.previews["watched"]))["pictures"]
    assert preview.shape == (1, 32, 32, 3)
    assert preview.float().std() > 5


def test_bfloat16_draws_a_finite_video(folder: Path) -> None:
    stages = InProcessStages(folder, torch.bfloat16)
    for images in ([], PICTURES[:1]):
        request = make_request(guidance_scale=2.0, num_outputs=2, num_images=len(images))
        assert stages.latents(request, images=images).isfinite().all()
        assert stages.pictures(request, images).shape == (2, 5, 32, 32, 3)


# Configuration.


def test_defaults_are_the_pipelines(checkpoint: Checkpoint) -> None:
    defaults = FAMILY.defaults(checkpoint)
    assert (defaults.height, defaults.width, defaults.size_multiple) == (512, 704, 8)
    assert (defaults.num_frames, defaults.frame_step, defaults.fps) == (161, 2, 25.0)
    assert (defaults.num_inference_steps, defaults.flow_shift) == (50, None)
    assert (defaults.guidance_scale, defaults.embedded_guidance_scale) == (3.0, None)
    assert (defaults.max_sequence_length, defaults.longest_sequence_length) == (128, 512)


def test_a_row_costs_its_latents(checkpoint: Checkpoint) -> None:
    assert FAMILY.num_tokens(make_request(width=64, num_frames=9), checkpoint) == 5 * 4 * 8


@pytest.mark.parametrize(
    ("stage_model", "parallel", "message"),
    [
        ("denoising", ParallelConfig(tp=3), r"tp_size=3 does not divide num_attention_heads=4; use 1, 2, 4$"),
        ("denoising", ParallelConfig(ulysses=8), r"ulysses_degree=8 .*num_attention_heads=4; use 1, 2, 4; or ring"),
        ("text_encoding", ParallelConfig(tp=4), r"tp_size=4 does not divide num_heads=2; use 1, 2$"),
    ],
)
def test_degrees_that_do_not_divide_are_refused(
    checkpoint: Checkpoint, stage_model: str, parallel: ParallelConfig, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FAMILY.check_parallel(stage_model, checkpoint, parallel)


def test_a_transformer_with_patches_is_refused(tmp_path: Path, folder: Path) -> None:
    copy = tmp_path / "patches"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(config | {"patch_size": 2}))
    with pytest.raises(ConfigurationError, match="patch_size=2 and patch_size_t=1; LTXPipeline works with 1 and 1"):
        FAMILY.defaults(open_checkpoint(str(copy)))
