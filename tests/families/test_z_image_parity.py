"""Our stages against diffusers' ZImagePipeline and ZImageImg2ImgPipeline on the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageImg2ImgPipeline, ZImagePipeline
from PIL import Image
from safetensors.torch import load

from checkpoints.parity import Pair, assert_close, differs, guided_arguments
from checkpoints.requests import make_blob, make_request
from checkpoints.stages import InProcessStages, Picture, alone
from checkpoints.z_image import LONGEST_PROMPT, build_z_image_checkpoint
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.z_image.family import FAMILY
from triton_diffusion.request import GenerationRequest
from triton_diffusion.runtime.calibration import WarmUp
from triton_diffusion.runtime.work import tokens_per_row
from triton_diffusion.state import read_state

PROMPTS = ("x", "ein blauer Würfel 蓝色", "the small green square stands left of a large yellow triangle, " * 3)


def arguments(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    # One picture an output: of a single one, the pipeline samples latents for the first output alone.
    resized = [image.resize((request.width, request.height), Image.Resampling.LANCZOS) for image in images]
    changed = {"image": resized * request.num_outputs, "strength": request.strength} if images else {}
    return changed | guided_arguments(request)


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(build_z_image_checkpoint(tmp_path_factory.mktemp("z_image")), ZImagePipeline, arguments)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same weights, with a schedule that depends on the size."""
    folder = build_z_image_checkpoint(tmp_path_factory.mktemp("dynamic"), dynamic_shift=True)
    return Pair(folder, ZImagePipeline, arguments)


def make(**values: Any) -> GenerationRequest:
    return make_request(**{"num_inference_steps": 2, "max_sequence_length": 96, "guidance_scale": 0.0} | values)


# Latents and pictures.


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (12, 4)])
@pytest.mark.parametrize("steps", [1, 4])
def test_latents_equal_the_pipelines(z_image: Pair, height: int, width: int, steps: int) -> None:
    """Sizes whose tokens are a multiple of 32, and others, which the transformer fills up."""
    z_image.check_latents(make(height=height, width=width, num_inference_steps=steps))


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_latents_equal_the_pipelines_for_every_seed(z_image: Pair, seed: int) -> None:
    drawn = z_image.check_latents(make(seed=seed))
    assert differs(drawn, z_image.stages.latents(make(seed=17)))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_latents_equal_the_pipelines_for_every_prompt(z_image: Pair, prompt: str) -> None:
    drawn = z_image.check_latents(make(prompt=prompt))
    assert differs(drawn, z_image.stages.latents(make()))


def test_pixels_are_within_one_of_the_pipelines(z_image: Pair) -> None:
    z_image.check_pictures(make(height=24, width=40, num_outputs=2, guidance_scale=3.0))


def test_outputs_equal_the_pipelines_with_one_generator_each(z_image: Pair) -> None:
    request = make(num_outputs=2, guidance_scale=3.0, negative_prompt="blurry")
    together = z_image.check_latents(request)
    assert differs(together[0], together[1])
    for index, seed in enumerate(request.output_seeds):
        assert_close(together[index : index + 1], z_image.stages.latents(replace(request, num_outputs=1, seed=seed)))


# Text.


@pytest.mark.parametrize("max_sequence_length", [1, 20, 32, LONGEST_PROMPT])
def test_a_prompt_is_cut_as_in_the_pipeline(z_image: Pair, max_sequence_length: int) -> None:
    request = make(prompt=PROMPTS[2] * 4, max_sequence_length=max_sequence_length)
    cut = z_image.check_latents(request)
    assert differs(cut, z_image.stages.latents(replace(request, max_sequence_length=64)))
    (warning,) = read_state(z_image.stages.encode("r", request)).warnings
    assert f"max_sequence_length={max_sequence_length}" in warning


def test_a_prompt_that_just_fits_leaves_no_warning(z_image: Pair) -> None:
    embeds = load(z_image.stages.encode("r", make()))["prompt_embeds"]
    fitting = make(max_sequence_length=embeds.shape[1])
    assert read_state(z_image.stages.encode("r", fitting)).warnings == []
    cut = make(max_sequence_length=embeds.shape[1] - 1)
    assert len(read_state(z_image.stages.encode("r", cut)).warnings) == 1


def test_prompts_encoded_together_equal_those_encoded_alone(z_image: Pair) -> None:
    requests = {
        "a": make(prompt="two black cats"),
        "b": make(prompt=PROMPTS[2], guidance_scale=2.0, negative_prompt="dark"),
        "c": make(prompt="two black cats", guidance_scale=2.0),
    }
    for request_id, request in requests.items():
        z_image.stages.admit("text_encoding", request_id, make_blob(request_id, request))
    done = z_image.stages.tick("text_encoding", [(request_id, 0) for request_id in requests])
    for request_id, request in requests.items():
        alone, together = load(z_image.stages.encode("alone", request)), load(done.results[request_id])
        assert together.keys() == alone.keys()
        for name, tensor in together.items():
            assert_close(tensor, alone[name])


# Guidance and schedule.


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0, 5.0])
@pytest.mark.parametrize("negative_prompt", ["", PROMPTS[2]])
def test_guidance_equals_the_pipelines(z_image: Pair, scale: float, negative_prompt: str) -> None:
    guided = z_image.check_latents(make(guidance_scale=scale, negative_prompt=negative_prompt))
    assert differs(guided, z_image.stages.latents(make(guidance_scale=3.0, negative_prompt="dark")))


def test_guidance_starts_above_zero_and_costs_a_second_prediction(z_image: Pair) -> None:
    unguided, guided = (make(guidance_scale=scale, negative_prompt="dark") for scale in (0.0, 0.4))
    assert differs(z_image.stages.latents(guided), z_image.stages.latents(unguided))
    costs = [tokens_per_row("denoising", FAMILY, z_image.stages.checkpoint, each) for each in (unguided, guided)]
    assert costs[1] == 2 * costs[0]


def test_a_dynamic_shift_depends_on_the_size_and_equals_the_pipelines(z_image: Pair, dynamic: Pair) -> None:
    request = make(height=64, width=64, num_inference_steps=3)
    assert differs(dynamic.check_latents(request), z_image.check_latents(request))


def test_flow_shift_is_the_schedulers_shift(z_image: Pair) -> None:
    request = make(flow_shift=7.0, num_inference_steps=3)
    drawn = z_image.stages.latents(request)
    assert differs(drawn, z_image.check_latents(replace(request, flow_shift=None)))
    usual = z_image.pipeline.scheduler
    z_image.pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(usual.config, shift=7.0)
    try:
        assert_close(drawn, z_image.reference(request))
    finally:
        z_image.pipeline.scheduler = usual


# Batches of rows at different steps.


def test_rows_at_different_steps_and_of_different_prompts_share_a_batch(z_image: Pair) -> None:
    requests = {
        "first": make(num_inference_steps=4, seed=1, prompt=PROMPTS[2]),
        "guided": make(num_inference_steps=2, seed=2, guidance_scale=4.0, negative_prompt="dark", num_outputs=2),
        "short": make(num_inference_steps=2, seed=3, prompt="x"),
        "late": make(num_inference_steps=3, seed=4, prompt="a lighthouse", guidance_scale=2.0),
    }
    z_image.check_batch(requests, {"first": 0, "guided": 1, "short": 1, "late": 2})


def test_bfloat16_latents_stay_in_float32_as_the_pipelines(z_image: Pair) -> None:
    latents = InProcessStages(z_image.stages.checkpoint.path, torch.bfloat16).latents(make(guidance_scale=2.0))
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


# Changed pictures.


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_a_changed_picture_equals_the_pipelines(z_image: Pair, strength: float) -> None:
    pictures = [np.random.default_rng(seed).integers(0, 256, (45, 70, 3), np.uint8) for seed in (0, 1)]
    request = make(num_images=1, strength=strength, num_inference_steps=4, num_outputs=2, guidance_scale=2.0)
    drawn = _check_changed(z_image, request, pictures[:1])
    other = z_image.stages.latents(request, images=pictures[1:])
    assert differs(drawn, other) == (strength < 1), "all noise at the start: nothing is left of the picture"
    less = replace(request, strength=0.3 if strength > 0.3 else 0.6)
    assert differs(drawn, z_image.stages.latents(less, images=pictures[:1]))


def _check_changed(pair: Pair, request: GenerationRequest, pictures: list[Picture]) -> torch.Tensor:
    usual = pair.pipeline
    pair.pipeline = ZImageImg2ImgPipeline(**usual.components)
    pair.pipeline.set_progress_bar_config(disable=True)
    try:
        return pair.check_latents(request, pictures)
    finally:
        pair.pipeline = usual


# Warm-up, defaults and degrees.


@pytest.mark.parametrize("stage_model", ["text_encoding", "denoising", "decoding"])
def test_the_warm_up_runs(z_image: Pair, stage_model: str) -> None:
    executor = z_image.stages.executors[stage_model]
    components = executor._plan.on_tick._components  # type: ignore[attr-defined]
    assert WarmUp(stage_model, executor, FAMILY, components, alone()).warm_up([(32, 16)], 1)


def test_defaults_are_the_pipelines_and_the_checkpoints(z_image: Pair, dynamic: Pair) -> None:
    defaults = FAMILY.defaults(z_image.stages.checkpoint)
    assert (defaults.height, defaults.width, defaults.size_multiple) == (1024, 1024, 4)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (50, 5.0)
    assert (defaults.max_sequence_length, defaults.longest_sequence_length) == (LONGEST_PROMPT, LONGEST_PROMPT)
    assert (defaults.flow_shift, defaults.strength, defaults.max_images) == (3.0, 0.6, 1)
    assert FAMILY.defaults(dynamic.stages.checkpoint).flow_shift is None


def test_cost_counts_the_tokens_that_fill_up(z_image: Pair) -> None:
    counts = [FAMILY.num_image_tokens(make(height=4 * side), z_image.stages.checkpoint) for side in (4, 5)]
    assert counts == [32, 64]


def test_degrees_that_do_not_divide_are_refused(z_image: Pair) -> None:
    checkpoint = z_image.stages.checkpoint
    with pytest.raises(ConfigurationError, match=r"tp_size=3 does not divide n_heads=4 and dim / 3 \* 8=128"):
        FAMILY.check_parallel("denoising", checkpoint, ParallelConfig(tp=3))
    with pytest.raises(ConfigurationError, match="tp_size=3 does not divide num_attention_heads=4 and"):
        FAMILY.check_parallel("text_encoding", checkpoint, ParallelConfig(tp=3))
