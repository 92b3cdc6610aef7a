"""Our stages against diffusers' Flux2Pipeline and Flux2KleinPipeline on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from safetensors.torch import load
from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from checkpoints.flux2 import PIXELS_PER_TOKEN, build_flux2_checkpoint, build_klein_checkpoint
from checkpoints.parity import Pair, assert_close, common_arguments, differs
from checkpoints.requests import make_request as make_any_request
from checkpoints.stages import Picture
from triton_diffusion.config import ChainConfig, ParallelConfig
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.families.flux2 import references
from triton_diffusion.families.flux2.denoise import empirical_shift
from triton_diffusion.families.registry import describe_checkpoint
from triton_diffusion.request import GenerationRequest
from triton_diffusion.state import read_state

PROMPTS = ("x", "ein blauer Würfel 蓝色 [IMG]", "the small green square stands left of a large yellow triangle, " * 9)
LENGTH = 80
"""Tokens: FLUX.2-dev begins with a system message."""


def make_request(**values: Any) -> GenerationRequest:
    return make_any_request(**{"max_sequence_length": LENGTH, "num_inference_steps": 2} | values)


class Flux2Pair(Pair):
    """Latents as they leave the last step: Klein's pipeline gives them out otherwise."""

    def reference(self, request: GenerationRequest, images: Sequence[Picture] = (), output_type: str = "latent") -> Any:
        if output_type != "latent":
            return super().reference(request, images, output_type)
        last: dict[str, Any] = {}

        def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            last.update(tensors)
            return tensors

        arguments = self._arguments
        self._arguments = lambda *given: arguments(*given) | {"callback_on_step_end": keep}
        super().reference(request, images, output_type)
        self._arguments = arguments
        return last["latents"]


def common(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    return common_arguments(request) | {"image": images or None}


def load_flux2(folder: Path, dtype: torch.dtype) -> Flux2Pipeline:
    """With a tokenizer in place of the PixtralProcessor, which cannot be imported without torchvision."""
    classes = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Mistral3ForConditionalGeneration,
        "tokenizer": PreTrainedTokenizerFast,
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
    }
    return Flux2Pipeline(**{name: each.from_pretrained(folder / name) for name, each in classes.items()}).to(dtype)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Flux2Pair:
    folder = build_flux2_checkpoint(tmp_path_factory.mktemp("flux2"))

    def arguments(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
        return common(request, images) | {"guidance_scale": request.embedded_guidance_scale}

    return Flux2Pair(folder, SimpleNamespace(from_pretrained=load_flux2), arguments)


def make_klein_pair(folder: Path, *, is_distilled: bool = False) -> Flux2Pair:
    def arguments(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
        # The pipeline takes no negative prompt but an empty one, and its embeddings.
        negative, _ = pair.pipeline.encode_prompt(
            request.negative_prompt,
            num_images_per_prompt=request.num_outputs,
            max_sequence_length=request.max_sequence_length,
        )
        given = {"negative_prompt_embeds": negative} if request.negative_prompt else {}
        return common(request, images) | given | {"guidance_scale": request.guidance_scale}

    folder = build_klein_checkpoint(folder, is_distilled=is_distilled)
    pair = Flux2Pair(folder, Flux2KleinPipeline, arguments)
    return pair


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Flux2Pair:
    return make_klein_pair(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Flux2Pair:
    """Klein in few steps, without guidance."""
    return make_klein_pair(tmp_path_factory.mktemp("distilled"), is_distilled=True)


def draw_picture(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# Text to image.


@pytest.mark.parametrize(("height", "width", "steps"), [(32, 32, 1), (24, 64, 4), (4, 8, 5)])
def test_latents_equal_the_pipelines_at_every_size_and_step_count(
    dev: Flux2Pair, klein: Flux2Pair, height: int, width: int, steps: int
) -> None:
    request = make_request(height=height, width=width, num_inference_steps=steps)
    for pair in (dev, klein):
        assert differs(pair.check_latents(request), pair.stages.latents(replace(request, seed=8)))


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "not ascii", "long"])
@pytest.mark.parametrize("max_sequence_length", [LENGTH, 120])
def test_latents_equal_the_pipelines_for_every_prompt(
    dev: Flux2Pair, klein: Flux2Pair, prompt: str, max_sequence_length: int
) -> None:
    request = make_request(prompt=prompt, max_sequence_length=max_sequence_length, seed=2**40)
    for pair in (dev, klein):
        assert differs(pair.check_latents(request), pair.stages.latents(replace(request, prompt="a lighthouse")))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_embedded_guidance_is_flux2s_guidance_scale(dev: Flux2Pair, scale: float) -> None:
    drawn = dev.check_latents(make_request(embedded_guidance_scale=scale))
    assert differs(drawn, dev.stages.latents(make_request(embedded_guidance_scale=9.0)))


@pytest.mark.parametrize("negative_prompt", ["", "blurry, dark, low quality"])
def test_guidance_is_kleins_guidance_scale(klein: Flux2Pair, negative_prompt: str) -> None:
    request = make_request(guidance_scale=4.0, negative_prompt=negative_prompt)
    guided = klein.check_latents(request)
    assert differs(guided, klein.stages.latents(replace(request, guidance_scale=3.0)))
    assert differs(guided, klein.stages.latents(replace(request, negative_prompt="two black cats")))


def test_a_distilled_klein_has_no_guidance_whatever_its_scale(distilled: Flux2Pair) -> None:
    family, request = distilled.stages.family, make_request(guidance_scale=4.0)
    drawn = distilled.check_latents(request)
    assert torch.equal(drawn, distilled.stages.latents(replace(request, guidance_scale=1.0)))
    assert not any(name.startswith("negative.") for name in load(distilled.stages.encode("r", request)))
    assert not family.uses_guidance(request, distilled.stages.checkpoint)
    described = describe_checkpoint(distilled.stages.checkpoint, ChainConfig(), takes_images=True)
    assert "guidance_scale" not in described["parameters"]


def test_outputs_and_pixels_equal_the_pipelines(dev: Flux2Pair, klein: Flux2Pair) -> None:
    for pair in (dev, klein):
        pair.check_pictures(make_request(height=24, width=40, num_outputs=2, guidance_scale=1.0))


@pytest.mark.parametrize("steps", [1, 28, 200])
@pytest.mark.parametrize("tokens", [64, 4300, 4301, 9000])
def test_the_shift_is_that_of_diffusers(tokens: int, steps: int) -> None:
    assert empirical_shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), abs=1e-12)


# Pictures beside.


@pytest.mark.parametrize("shapes", [[(64, 64)], [(67, 90), (130, 65)]], ids=str)
def test_pictures_beside_equal_the_pipelines(dev: Flux2Pair, klein: Flux2Pair, shapes: list[tuple[int, int]]) -> None:
    request = make_request(num_images=len(shapes), num_outputs=2, guidance_scale=2.0)
    pictures = [draw_picture(*shape, index) for index, shape in enumerate(shapes)]
    for pair in (dev, klein):
        asked = replace(request, guidance_scale=1.0) if pair is dev else request
        drawn = pair.check_latents(asked, pictures)
        assert differs(drawn, pair.stages.latents(asked, images=[*pictures[:-1], 255 - pictures[-1]]))
        if len(pictures) > 1:
            assert differs(drawn, pair.stages.latents(asked, images=pictures[::-1]))


def test_a_picture_that_is_too_large_is_scaled_as_in_the_pipeline(
    klein: Flux2Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To so many pixels that a test cannot draw beside them: here to fewer, and the pipeline is handed it scaled."""
    area, picture, request = 7000, draw_picture(120, 175), make_request(num_images=1)
    monkeypatch.setattr(references, "LARGEST_AREA", area)
    blob = klein.stages.encode("large", request, [picture])
    assert read_state(blob).tensor_infos["image_latents_0"].shape == (1, 17, 25, 16)
    drawn = load(klein.stages.run("denoising", "large", blob))["latents"]
    scaled = klein.pipeline.image_processor._resize_to_target_area(Image.fromarray(picture), area)
    assert_close(drawn, klein.reference(request, [np.asarray(scaled)]))


def test_scaling_is_that_of_the_pipeline() -> None:
    """By its own number of pixels."""
    for height, width in ((1024, 1024), (1025, 1024), (3000, 1777), (900, 7000)):
        picture = Image.new("RGB", (width, height))
        scaled = Flux2ImageProcessor._resize_if_exceeds_area(picture)
        assert references.scaled_size(height, width) == (scaled.height, scaled.width)


# Batches.


def test_rows_at_different_steps_are_drawn_as_they_are_alone(dev: Flux2Pair, klein: Flux2Pair) -> None:
    requests = {
        "first": make_request(num_inference_steps=4, seed=1, num_outputs=2),
        "late": make_request(num_inference_steps=3, seed=2, prompt="x", embedded_guidance_scale=1.5),
    }
    dev.check_batch(requests, {"first": 0, "late": 1})
    guided = make_request(num_inference_steps=3, seed=3, guidance_scale=4.0, negative_prompt="dark")
    klein.check_batch(requests | {"guided": guided}, {"first": 0, "late": 1, "guided": 2})


def test_rows_with_pictures_share_their_batches(klein: Flux2Pair) -> None:
    requests = {
        "first": make_request(num_inference_steps=3, seed=1, num_images=2),
        "guided": make_request(seed=3, num_images=2, guidance_scale=4.0, prompt="two black cats"),
    }
    pictures = {name: [draw_picture(64, 70, seed), draw_picture(66, 65, seed)] for seed, name in enumerate(requests)}
    klein.check_batch(requests, {"first": 0, "guided": 1}, pictures)


def test_pictures_of_other_shapes_share_no_batch(klein: Flux2Pair) -> None:
    def key(name: str, *shapes: tuple[int, int]) -> str:
        request = make_request(num_images=len(shapes))
        blob = klein.stages.encode(name, request, [draw_picture(*shape) for shape in shapes])
        return klein.stages.family.batch_key("denoising", request, read_state(blob).tensor_infos)

    assert key("a", (64, 80)) == key("b", (65, 83))
    assert len({key("c", (64, 80)), key("d", (80, 64)), key("e", (64, 80), (64, 80)), key("f")}) == 4


# Warnings, defaults and limits.


def test_a_prompt_that_is_cut_leaves_a_warning(dev: Flux2Pair, klein: Flux2Pair) -> None:
    for pair in (dev, klein):
        (warning,) = read_state(pair.stages.encode("cut", make_request(prompt=PROMPTS[2]))).warnings
        assert f"max_sequence_length={LENGTH}" in warning
        assert not read_state(pair.stages.encode("fits", make_request(prompt="x"))).warnings


def test_defaults_are_those_of_pipeline_and_checkpoint(dev: Flux2Pair, klein: Flux2Pair, distilled: Flux2Pair) -> None:
    defaults = dev.stages.family.defaults(dev.stages.checkpoint)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.embedded_guidance_scale) == (50, 1.0, 4.0)
    assert (defaults.height, defaults.size_multiple, defaults.max_images) == (32, PIXELS_PER_TOKEN, 10)
    defaults = klein.stages.family.defaults(klein.stages.checkpoint)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.embedded_guidance_scale) == (50, 4.0, None)
    defaults = distilled.stages.family.defaults(distilled.stages.checkpoint)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (4, 1.0)


def test_the_first_picture_gives_the_size_and_small_ones_are_refused(klein: Flux2Pair) -> None:
    family = klein.stages.family
    defaults = family.defaults(klein.stages.checkpoint)
    assert family.default_size(defaults, []) == (32, 32)
    assert family.default_size(defaults, [(67, 90), (500, 500)]) == (64, 88)
    assert family.default_size(defaults, [(2000, 1000)]) == (1448, 724)
    with pytest.raises(InvalidRequestError, match="63 x 500 pixels; this model needs 64"):
        family.default_size(defaults, [(100, 100), (63, 500)])
    with pytest.raises(InvalidRequestError, match="may be 8 times the other"):
        family.default_size(defaults, [(64, 513)])


def test_the_cost_counts_the_pictures_beside(klein: Flux2Pair) -> None:
    family, checkpoint = klein.stages.family, klein.stages.checkpoint
    alone = family.num_tokens(make_request(), checkpoint)
    assert alone == LENGTH + 64
    assert family.num_tokens(make_request(num_images=2), checkpoint) == alone + 2 * (1024 // PIXELS_PER_TOKEN) ** 2


def test_degrees_that_do_not_divide_are_refused(dev: Flux2Pair, klein: Flux2Pair) -> None:
    with pytest.raises(ConfigurationError, match="tp_size=3 does not divide num_attention_heads=4"):
        dev.stages.family.check_parallel("denoising", dev.stages.checkpoint, ParallelConfig(tp=3))
    with pytest.raises(ConfigurationError, match="tp_size=3 does not divide num_attention_heads=2"):
        klein.stages.family.check_parallel("text_encoding", klein.stages.checkpoint, ParallelConfig(tp=3))
    with pytest.raises(ConfigurationError, match="tp_size=3 does not divide num_attention_heads=4"):
        dev.stages.family.check_parallel("text_encoding", dev.stages.checkpoint, ParallelConfig(tp=3))
