"""Our stages against diffusers' StableDiffusionPipeline and its img2img on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load

from checkpoints.parity import Pair, assert_close, differs
from checkpoints.stable_diffusion import (
    LONG_PROMPT,
    NOISE,
    PICTURE,
    build_stable_diffusion_checkpoint,
    edit_json,
    make_short_request,
    stable_diffusion_pair,
    with_noise_scheduler,
)
from checkpoints.text import CLIP_TOKENS
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.state import read_state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stable_diffusion_checkpoint(tmp_path_factory.mktemp("stable-diffusion") / "1")


@pytest.fixture(scope="module")
def one(checkpoint: Path) -> Pair:
    return stable_diffusion_pair(checkpoint)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = build_stable_diffusion_checkpoint(tmp_path_factory.mktemp("stable-diffusion") / "2", is_2=True)
    return stable_diffusion_pair(folder)


# Latents and pictures.


@pytest.mark.parametrize(("height", "width", "steps"), [(32, 32, 1), (24, 40, 2), (8, 8, 5)])
def test_latents_equal_the_pipelines_at_every_size_and_step_count(
    one: Pair, height: int, width: int, steps: int
) -> None:
    one.check_latents(make_short_request(height=height, width=width, num_inference_steps=steps))


def test_a_unet_that_predicts_v_equals_the_pipelines(two: Pair) -> None:
    two.check_latents(make_short_request(num_inference_steps=3, guidance_scale=3.0))


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_latents_equal_the_pipelines_for_every_seed(one: Pair, seed: int) -> None:
    drawn = one.check_latents(make_short_request(seed=seed))
    assert differs(drawn, one.stages.latents(make_short_request()))


@pytest.mark.parametrize("prompt", ["x", "ein blauer Würfel 蓝色", "  two  black\tcats \n"])
def test_latents_equal_the_pipelines_for_every_prompt(one: Pair, prompt: str) -> None:
    drawn = one.check_latents(make_short_request(prompt=prompt))
    assert differs(drawn, one.stages.latents(make_short_request()))


def test_pixels_are_within_one_of_the_pipelines(one: Pair) -> None:
    one.check_pictures(make_short_request(height=24, width=40, num_outputs=2, guidance_scale=2.0))


def test_outputs_equal_the_pipelines_with_one_generator_each(one: Pair) -> None:
    latents = one.check_latents(make_short_request(num_outputs=2))
    assert differs(latents[0], latents[1])


# Text and guidance.


def test_a_prompt_that_is_too_long_is_cut_as_in_the_pipeline_and_leaves_a_warning(one: Pair) -> None:
    request = make_short_request(prompt=LONG_PROMPT)
    one.check_latents(request)
    num_tokens = len(one.pipeline.text.tokenizer(LONG_PROMPT).input_ids)
    (warning,) = read_state(one.stages.encode("long", request)).warnings
    assert f"{num_tokens} tokens" in warning
    assert f"max_sequence_length={CLIP_TOKENS}" in warning
    assert not read_state(one.stages.encode("short", make_short_request(prompt="two black cats"))).warnings


def test_fewer_tokens_are_those_of_a_shorter_tokenizer(one: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one.pipeline.text.tokenizer, "model_max_length", 6)
    drawn = one.check_latents(make_short_request(max_sequence_length=6, guidance_scale=2.0))
    assert differs(drawn, one.stages.latents(make_short_request(guidance_scale=2.0)))


def test_no_room_for_the_marks_of_a_prompt_is_the_callers_mistake(one: Pair) -> None:
    with pytest.raises(InvalidRequestError, match="max_sequence_length=1 must be at least 2"):
        one.stages.latents(make_short_request(max_sequence_length=1))


@pytest.mark.parametrize("negative_prompt", ["blurry, dark, low quality", "", LONG_PROMPT])
def test_guided_latents_equal_the_pipelines(one: Pair, negative_prompt: str) -> None:
    request = make_short_request(guidance_scale=4.0, negative_prompt=negative_prompt)
    guided = one.check_latents(request)
    assert differs(guided, one.stages.latents(replace(request, guidance_scale=1.0)))
    assert differs(guided, one.stages.latents(replace(request, negative_prompt="two black cats")))


# Pictures that are changed.


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_a_changed_picture_equals_the_img2img_pipelines(one: Pair, strength: float) -> None:
    request = make_short_request(num_inference_steps=5, strength=strength, num_images=1)
    drawn = one.check_latents(request, [PICTURE])
    assert differs(drawn, one.stages.latents(replace(request, strength=0.8), images=[PICTURE]))
    assert differs(drawn, one.stages.latents(request, images=[255 - PICTURE]))


def test_changed_pictures_are_guided_and_seeded_and_decoded_as_in_the_img2img_pipeline(two: Pair) -> None:
    request = make_short_request(
        num_inference_steps=3, strength=0.7, num_images=1, num_outputs=2, guidance_scale=3.0, negative_prompt="dark"
    )
    pictures = two.check_pictures(request, [PICTURE])
    assert differs(pictures[0].float(), pictures[1].float())


def test_a_picture_of_another_size_is_scaled_to_that_of_the_request(one: Pair) -> None:
    large = np.random.default_rng(1).integers(0, 256, (56, 80, 3), dtype=np.uint8)
    request = make_short_request(height=24, width=40, strength=0.5, num_images=1)
    scaled = one.pipeline.image.image_processor.resize(Image.fromarray(large), 24, 40)
    assert_close(one.stages.latents(request, images=[large]), one.reference(request, [np.asarray(scaled)]))


# Noise schedulers.

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM that clips and starts at 0": ("DDIMScheduler", {"steps_offset": 0}),
    "Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "DPM-Solver++ with noise": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "Heun": ("HeunDiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "PNDM with Runge and Kutta's steps": ("PNDMScheduler", {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_noise_scheduler_draws_as_in_the_pipelines(
    checkpoint: Path, one: Pair, tmp_path: Path, name: str
) -> None:
    """Two outputs of a picture that is changed and one that is new share the batch, at steps of their own."""
    class_name, config = SCHEDULERS[name]
    noise_scheduler = getattr(diffusers, class_name)(**NOISE | config)
    pair = stable_diffusion_pair(with_noise_scheduler(checkpoint, noise_scheduler, tmp_path / "checkpoint"))
    steps = 4 if name.startswith("PNDM") else 3
    new = make_short_request(num_inference_steps=steps, guidance_scale=2.0)
    changed = make_short_request(num_inference_steps=steps, strength=0.7, num_images=1, num_outputs=2, seed=3)
    pair.check_batch({"new": new, "changed": changed}, {"new": 0, "changed": 1}, {"changed": [PICTURE]})
    assert differs(pair.stages.latents(new), one.stages.latents(new)), "another noise scheduler, another picture"


def test_too_few_steps_for_runge_and_kutta_are_the_callers_mistake(checkpoint: Path, tmp_path: Path) -> None:
    folder = with_noise_scheduler(checkpoint, diffusers.PNDMScheduler(**NOISE), tmp_path / "checkpoint")
    opened = open_checkpoint(str(folder))
    with pytest.raises(InvalidRequestError, match="num_inference_steps=3 must be at least 4"):
        find_family(opened).num_steps(make_short_request(num_inference_steps=3), opened)


# Batches.


def test_rows_at_different_steps_are_drawn_as_they_are_alone(one: Pair) -> None:
    requests = {
        "first": make_short_request(num_inference_steps=4, seed=1),
        "guided": make_short_request(num_inference_steps=2, seed=2, guidance_scale=4.0, negative_prompt="dark"),
        "changed": make_short_request(num_inference_steps=3, strength=0.7, num_images=1, num_outputs=2),
        "long": make_short_request(num_inference_steps=3, prompt=LONG_PROMPT, guidance_scale=1.5),
    }
    one.check_batch(requests, {"first": 0, "guided": 1, "changed": 1, "long": 2}, {"changed": [PICTURE]})


def test_a_preview_is_near_the_picture(two: Pair) -> None:
    request = make_short_request(num_inference_steps=3, preview_interval=1)
    final = two.stages.latents(request)
    two.stages.admit("denoising", "watched", two.stages.encode("watched", request))
    previews = [two.stages.tick("denoising", [("watched", 0)]).previews["watched"] for _ in range(2)]
    two.stages.executors["denoising"].drop("watched")
    latents = [load(preview)["latents"] for preview in previews]
    distances = [(each - final).abs().mean().item() for each in latents]
    assert distances[1] < 0.5 * distances[0]


# Configuration.


def test_defaults_are_the_pipelines(one: Pair) -> None:
    defaults = one.stages.family.defaults(one.stages.checkpoint)
    assert (defaults.height, defaults.width, defaults.size_multiple) == (32, 32, 8)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.strength) == (50, 7.5, 0.8)
    assert defaults.max_sequence_length == defaults.longest_sequence_length == CLIP_TOKENS


def test_a_picture_that_is_changed_keeps_its_size(one: Pair) -> None:
    defaults = one.stages.family.defaults(one.stages.checkpoint)
    assert one.stages.family.default_size(defaults, [(57, 83)]) == (56, 80)
    assert one.stages.family.default_size(defaults, [(3, 8)]) == (8, 8)
    assert one.stages.family.default_size(defaults, []) == (32, 32)


@pytest.mark.parametrize("stage_model", ["denoising", "text_encoding"])
@pytest.mark.parametrize("degree", ["tp", "ulysses", "ring"])
def test_only_batches_and_guidance_are_divided(one: Pair, stage_model: str, degree: str) -> None:
    family, checkpoint = one.stages.family, one.stages.checkpoint
    family.check_parallel(stage_model, checkpoint, ParallelConfig(cfg=2))
    with pytest.raises(ConfigurationError, match="no tensor or sequence parallelism; use dp_size or enable_cfg"):
        family.check_parallel(stage_model, checkpoint, ParallelConfig(**{degree: 2}))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"in_channels": 9}, "in_channels=9.*a mask or a depth map"), ({"time_cond_proj_dim": 32}, "distilled")],
)
def test_a_unet_that_takes_more_than_a_prompt_is_refused(
    checkpoint: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    folder = with_noise_scheduler(checkpoint, diffusers.DDIMScheduler(), tmp_path / "checkpoint")
    edit_json(folder / "unet" / "config.json", **values)
    opened = open_checkpoint(str(folder))
    with pytest.raises(ConfigurationError, match=message):
        find_family(opened).defaults(opened)
