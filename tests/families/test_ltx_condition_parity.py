"""Our stages against diffusers' LTXConditionPipeline (LTX-Video 0.9.5 and later) on the same weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image
from safetensors.torch import load

from checkpoints.ltx_video import build_ltx_condition_checkpoint
from checkpoints.ltx_video_pair import LtxPair, make_request
from checkpoints.parity import Pair, assert_close, differs, guided_arguments
from checkpoints.stages import InProcessStages, Picture
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.ltx_video import FAMILY, first_frame
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.request import GenerationRequest

PICTURES = [
    np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    for seed, size in enumerate([(32, 32, 3), (50, 21, 3)])
]
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "dark"}


def arguments(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    given = {"conditions": [LTXVideoCondition(image=images[0], frame_index=0, strength=1.0)]} if images else {}
    return guided_arguments(request, videos=True) | {"frame_rate": request.fps} | given


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_ltx_condition_checkpoint(tmp_path_factory.mktemp("ltx-condition"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return LtxPair(folder, LTXConditionPipeline, arguments)


@pytest.fixture(scope="module")
def plain(pair: Pair) -> torch.Tensor:
    """The latents of make_request()."""
    return pair.check_latents(make_request())


# From text.


@pytest.mark.parametrize(
    ("height", "width", "num_frames", "steps"), [(32, 32, 1, 1), (32, 96, 3, 2), (64, 32, 9, 5), (96, 64, 5, 8)]
)
def test_latents_equal_the_pipelines_at_every_size_length_and_step_count(
    pair: Pair, height: int, width: int, num_frames: int, steps: int
) -> None:
    pair.check_latents(make_request(height=height, width=width, num_frames=num_frames, num_inference_steps=steps))


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "x"}, {"max_sequence_length": 5}, {"fps": 8.0}, {"seed": 2**63 - 1}, GUIDED],
    ids=lambda changes: next(iter(changes)),
)
def test_every_parameter_is_the_pipelines(pair: Pair, plain: torch.Tensor, changes: dict[str, Any]) -> None:
    assert differs(pair.check_latents(make_request(**changes)), plain)


def test_padding_is_seen_by_nobody(pair: Pair, plain: torch.Tensor) -> None:
    assert_close(pair.check_latents(make_request(max_sequence_length=128)), plain)


def test_the_same_weights_under_the_older_name_draw_what_the_older_pipeline_does(
    folder: Path, tmp_path: Path, pair: Pair
) -> None:
    """Schedule, positions in time and the text encoder's mask belong to the pipeline that model_index.json names."""
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    index = older / "model_index.json"
    index.write_text(index.read_text().replace("LTXConditionPipeline", "LTXPipeline"))
    request = make_request(num_inference_steps=4)
    assert differs(pair.check_latents(request), LtxPair(older, LTXPipeline, arguments).check_latents(request))


@pytest.mark.parametrize("images", [[], PICTURES[1:]], ids=["from text", "from a picture"])
def test_frames_are_within_one_of_the_pipelines(pair: Pair, images: list[Picture]) -> None:
    video = pair.check_pictures(make_request(width=64, num_frames=9, num_images=len(images), **GUIDED), images).float()
    assert video.shape == (1, 9, 32, 64, 3)
    assert (video[:, 0] - video[:, -1]).abs().mean() > 5, "frames differ"


# From a picture.


@pytest.mark.parametrize(
    ("index", "width", "num_frames", "steps"), [(0, 32, 5, 3), (1, 64, 9, 6), (1, 32, 1, 2), (0, 32, 3, 1)]
)
def test_a_picture_becomes_the_first_frame_as_in_the_pipeline(
    pair: Pair, index: int, width: int, num_frames: int, steps: int
) -> None:
    request = make_request(width=width, num_frames=num_frames, num_inference_steps=steps, num_images=1)
    drawn = pair.check_latents(request, [PICTURES[index]])
    assert differs(drawn, pair.stages.latents(request, images=[255 - PICTURES[index]]))
    assert differs(drawn, pair.stages.latents(replace(request, num_images=0)))


def test_guidance_with_a_picture_is_the_pipelines(pair: Pair) -> None:
    request = make_request(num_images=1, **GUIDED)
    drawn = pair.check_latents(request, PICTURES[:1])
    assert differs(drawn, pair.check_latents(replace(request, negative_prompt="x"), PICTURES[:1]))


def test_each_output_of_a_picture_is_what_the_pipeline_draws_for_its_seed(pair: Pair) -> None:
    """Asked for two at once, the pipeline has one sample of the picture for both."""
    request = make_request(num_images=1, num_outputs=2)
    latents = pair.stages.latents(request, images=PICTURES[:1])
    assert differs(latents[:1], latents[1:])
    for output, seed in zip(latents.split(1), request.output_seeds, strict=True):
        assert_close(output, pair.reference(replace(request, num_outputs=1, seed=seed), PICTURES[:1]))


def test_outputs_from_text_equal_the_pipelines_with_one_generator_each(pair: Pair) -> None:
    pair.check_latents(make_request(num_outputs=2))


def test_the_noise_on_the_first_frame_shows_in_all_of_them(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(num_images=1)
    noisy = pair.check_latents(request, PICTURES[:1])
    monkeypatch.setattr(first_frame, "NOISE_SCALE", 0.0)
    still = pair.stages.latents(request, images=PICTURES[:1])
    for frame in range(noisy.shape[2]):
        assert differs(noisy[:, :, frame], still[:, :, frame])


def test_a_video_goes_on_from_a_checkpoint_with_the_noise_that_it_would_have_had(folder: Path) -> None:
    stages = InProcessStages(folder, checkpoint_steps=2)
    request = make_request(num_inference_steps=5, num_images=1, **GUIDED)
    blob = stages.encode("lost", request, PICTURES[:1])
    stages.admit("denoising", "lost", blob)
    (*_, done) = (stages.tick("denoising", [("lost", 0)]) for _ in range(3))
    assert done.checkpoints["lost"].done == [2]
    stages.executors["denoising"].drop("lost")
    stages.admit("denoising", "lost", blob, done.checkpoints["lost"].state)
    (*_, done) = (stages.tick("denoising", [("lost", 0)]) for _ in range(3))
    assert torch.equal(load(done.results["lost"])["latents"], stages.latents(request, images=PICTURES[:1]))


# Batches of rows at different steps.


def test_rows_at_different_steps_are_drawn_as_they_are_alone(pair: Pair) -> None:
    pair.check_batch(
        {
            "first": make_request(num_inference_steps=4, seed=1),
            "guided": make_request(num_inference_steps=2, seed=2, prompt="x", num_outputs=2, **GUIDED),
        },
        {"first": 0, "guided": 1},
    )


def test_rows_with_pictures_at_different_steps_are_drawn_as_they_are_alone(pair: Pair) -> None:
    pair.check_batch(
        {
            "first": make_request(num_inference_steps=4, seed=1, num_images=1),
            "guided": make_request(num_inference_steps=2, seed=2, num_images=1, **GUIDED),
            "late": make_request(num_inference_steps=3, seed=3, num_images=1, prompt="x"),
        },
        {"first": 0, "guided": 1, "late": 2},
        {"first": PICTURES[:1], "guided": PICTURES[1:], "late": PICTURES[1:]},
    )


def test_bfloat16_draws_a_finite_video(folder: Path) -> None:
    request = make_request(guidance_scale=2.0, num_outputs=2, num_images=1)
    assert InProcessStages(folder, torch.bfloat16).pictures(request, PICTURES[:1]).shape == (2, 5, 32, 32, 3)


# Configuration.


def test_defaults_are_the_pipelines(folder: Path) -> None:
    defaults = FAMILY.defaults(open_checkpoint(str(folder)))
    assert (defaults.height, defaults.width, defaults.size_multiple) == (512, 704, 8)
    assert (defaults.num_frames, defaults.frame_step, defaults.fps) == (161, 2, 25.0)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.flow_shift) == (50, 3.0, None)
    assert (defaults.max_sequence_length, defaults.longest_sequence_length) == (256, 512)
    assert (defaults.min_images, defaults.max_images) == (0, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True; LTXConditionPipeline .* set .*=False$"),
        ({"shift": 3.0, "shift_terminal": 0.1}, r"shift=3.0, shift_terminal=0.1; .* set shift=1.0, .*=None$"),
    ],
)
def test_a_noise_scheduler_that_would_move_the_schedule_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    checkpoint = open_checkpoint(str(build_ltx_condition_checkpoint(tmp_path, **changed)))
    with pytest.raises(ConfigurationError, match=message):
        FAMILY.defaults(checkpoint)
