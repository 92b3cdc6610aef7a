"""Our stages against diffusers' StableDiffusionXLPipeline and its img2img on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load

from checkpoints.parity import Pair, differs
from checkpoints.requests import make_blob
from checkpoints.stable_diffusion import (
    LONG_PROMPT,
    NOISE,
    PICTURE,
    build_stable_diffusion_xl_checkpoint,
    make_short_request,
    stable_diffusion_xl_pair,
    with_noise_scheduler,
)
from checkpoints.stages import InProcessStages, alone
from checkpoints.text import CLIP_TOKENS
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.runtime.stage_loading import load_stage
from triton_diffusion.state import read_state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stable_diffusion_xl_checkpoint(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def xl(checkpoint: Path) -> Pair:
    return stable_diffusion_xl_pair(checkpoint)


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With a mean and a deviation for each channel of the latents, and no zeros for an absent negative prompt."""
    mean = [-1.6, 1.1, 3.3, -0.4]
    folder = tmp_path_factory.mktemp("sdxl")
    plain = build_stable_diffusion_xl_checkpoint(folder / "plain", force_zeros=False, latents_mean=mean)
    return stable_diffusion_xl_pair(
        with_noise_scheduler(plain, diffusers.EDMDPMSolverMultistepScheduler(), folder / "playground")
    )


# Latents and pictures.


@pytest.mark.parametrize(("height", "width", "steps"), [(32, 32, 1), (24, 40, 2), (40, 16, 3)])
def test_latents_equal_the_pipelines_at_every_size_and_step_count(
    xl: Pair, height: int, width: int, steps: int
) -> None:
    xl.check_latents(make_short_request(height=height, width=width, num_inference_steps=steps))


def test_the_unet_is_told_the_size(checkpoint: Path, xl: Pair) -> None:
    """Latents of the same shape, so that only the size itself tells the two apart."""
    components = load_stage("denoising", str(checkpoint), alone(), dtype=torch.float32).components
    denoise, request = xl.stages.family.denoise, make_short_request()
    inputs = {name: torch.ones_like(tensor) for name, tensor in denoise.example_inputs(components, request).items()}
    shared = [denoise.shared_inputs(components, each, {}) for each in (request, replace(request, height=64))]
    latents = torch.ones(1, 4, 8, 8)
    one, other = (denoise.predict(components, latents, torch.tensor([500.0]), inputs, each) for each in shared)
    assert differs(one, other)


@pytest.mark.parametrize("prompt", ["x", "ein blauer Würfel 蓝色", LONG_PROMPT])
def test_latents_equal_the_pipelines_for_every_prompt(xl: Pair, prompt: str) -> None:
    drawn = xl.check_latents(make_short_request(prompt=prompt, seed=2**63 - 1))
    assert differs(drawn, xl.stages.latents(make_short_request(seed=2**63 - 1)))


def test_a_prompt_that_is_cut_leaves_a_warning(xl: Pair) -> None:
    (warning,) = read_state(xl.stages.encode("long", make_short_request(prompt=LONG_PROMPT))).warnings
    assert f"max_sequence_length={CLIP_TOKENS}" in warning


def test_no_room_for_the_marks_of_a_prompt_is_the_callers_mistake(xl: Pair) -> None:
    with pytest.raises(InvalidRequestError, match="max_sequence_length=1 must be at least 2"):
        xl.stages.latents(make_short_request(max_sequence_length=1))


def test_pixels_are_within_one_of_the_pipelines(xl: Pair) -> None:
    xl.check_pictures(make_short_request(height=24, width=40, num_outputs=2, guidance_scale=2.0))


# Guidance.


@pytest.mark.parametrize("negative_prompt", ["blurry, dark, low quality", " ", ""])
def test_guided_latents_equal_the_pipelines(xl: Pair, negative_prompt: str) -> None:
    request = make_short_request(guidance_scale=4.0, negative_prompt=negative_prompt, num_outputs=2)
    guided = xl.check_latents(request)
    assert differs(guided, xl.stages.latents(replace(request, guidance_scale=1.0)))


def test_no_negative_prompt_is_zeros_or_that_of_an_empty_text_as_the_checkpoint_says(
    xl: Pair, playground: Pair
) -> None:
    """A negative prompt that is there, even if it has no word, is never zeros."""
    for pair, text, is_zero in ((xl, "", True), (xl, " ", False), (playground, "", False)):
        blob = pair.stages.encode("r", make_short_request(guidance_scale=2.0, negative_prompt=text))
        tensors = load(blob)
        assert (tensors["negative.prompt_embeds"].abs().max() == 0).item() is is_zero
        assert (tensors["negative.pooled_prompt_embeds"].abs().max() == 0).item() is is_zero
        assert tensors["prompt_embeds"].abs().max() > 0


def test_zeros_and_a_blank_negative_prompt_are_told_apart_in_a_batch(xl: Pair) -> None:
    """CLIP is given the same tokens for both."""
    texts = {"none": "", "blank": " "}
    for request_id, text in texts.items():
        request = make_short_request(guidance_scale=2.0, negative_prompt=text)
        xl.stages.admit("text_encoding", request_id, make_blob(request_id, request))
    results = xl.stages.tick("text_encoding", [(request_id, 0) for request_id in texts]).results
    largest = {name: load(blob)["negative.prompt_embeds"].abs().max().item() for name, blob in results.items()}
    assert largest["none"] == 0 < largest["blank"]


# Pictures that are changed.


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_changed_picture_equals_the_img2img_pipelines(xl: Pair, strength: float) -> None:
    request = make_short_request(num_inference_steps=4, strength=strength, num_images=1, guidance_scale=2.0)
    drawn = xl.check_latents(request, [PICTURE])
    assert differs(drawn, xl.stages.latents(replace(request, strength=0.7), images=[PICTURE]))
    assert differs(drawn, xl.stages.latents(request, images=[255 - PICTURE]))


def test_latents_with_a_mean_a_channel_are_changed_and_decoded_as_in_the_pipelines(playground: Pair) -> None:
    playground.check_pictures(make_short_request(guidance_scale=2.0))
    request = make_short_request(num_inference_steps=3, strength=0.7, num_images=1, num_outputs=2)
    playground.check_latents(request, [PICTURE])
    playground.check_pictures(request, [PICTURE])


def test_an_autoencoder_that_overflows_in_float16_works_in_float32(checkpoint: Path, xl: Pair) -> None:
    request = make_short_request(num_inference_steps=3, strength=0.4, num_images=1)
    stages = InProcessStages(checkpoint, torch.bfloat16)
    blob = load(stages.encode("r", request, [PICTURE]))
    assert blob["initial_moments"].dtype == torch.float32
    assert blob["prompt_embeds"].dtype == torch.bfloat16
    latents = stages.latents(request, images=[PICTURE])
    assert latents.dtype == torch.bfloat16
    exact = xl.stages.latents(request, images=[PICTURE])
    assert (latents - exact).abs().mean() < 0.1 * exact.abs().mean()


# Batches and noise schedulers.


def test_rows_at_different_steps_are_drawn_as_they_are_alone(xl: Pair) -> None:
    requests = {
        "first": make_short_request(num_inference_steps=4, seed=1),
        "guided": make_short_request(num_inference_steps=2, seed=2, guidance_scale=4.0, negative_prompt="dark"),
        "zeros": make_short_request(num_inference_steps=2, seed=4, guidance_scale=3.0),
        "changed": make_short_request(num_inference_steps=3, strength=0.7, num_images=1, num_outputs=2),
        "long": make_short_request(num_inference_steps=3, prompt=LONG_PROMPT),
    }
    joins = {"first": 0, "guided": 1, "zeros": 1, "changed": 1, "long": 2}
    xl.check_batch(requests, joins, {"changed": [PICTURE]})


@pytest.mark.parametrize(
    "noise_scheduler",
    [
        diffusers.EulerAncestralDiscreteScheduler(**NOISE, timestep_spacing="trailing"),
        diffusers.DDIMScheduler(**NOISE | {"steps_offset": 0}, clip_sample=False),
    ],
    ids=lambda noise_scheduler: type(noise_scheduler).__name__,
)
def test_other_noise_schedulers_draw_as_in_the_pipeline(
    checkpoint: Path, xl: Pair, tmp_path: Path, noise_scheduler: object
) -> None:
    """Settings that are corrected for Stable Diffusion 1 are followed here, as the pipelines do."""
    pair = stable_diffusion_xl_pair(with_noise_scheduler(checkpoint, noise_scheduler, tmp_path / "checkpoint"))
    request = make_short_request(num_inference_steps=3, num_outputs=2)
    assert differs(pair.check_latents(request), xl.stages.latents(request))


# Configuration.


def test_defaults_are_the_pipelines(xl: Pair) -> None:
    defaults = xl.stages.family.defaults(xl.stages.checkpoint)
    assert (defaults.height, defaults.width, defaults.size_multiple) == (32, 32, 8)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.strength) == (50, 5.0, 0.3)
    assert defaults.max_sequence_length == defaults.longest_sequence_length == CLIP_TOKENS


def test_only_batches_and_guidance_are_divided(xl: Pair) -> None:
    family = xl.stages.family
    family.check_parallel("denoising", xl.stages.checkpoint, ParallelConfig(cfg=2))
    with pytest.raises(ConfigurationError, match="no tensor or sequence parallelism"):
        family.check_parallel("denoising", xl.stages.checkpoint, ParallelConfig(tp=2))
