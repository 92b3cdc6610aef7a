"""Our stages against diffusers' StableDiffusion3Pipeline and StableDiffusion3Img2ImgPipeline on the same weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load

from checkpoints.parity import Pair, assert_close, differs, guided_arguments
from checkpoints.requests import make_request
from checkpoints.stable_diffusion_3 import LARGEST_SIDE, build_stable_diffusion_3_checkpoint
from checkpoints.stages import Picture
from checkpoints.text import CLIP_TOKENS
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.loading.checkpoint import Checkpoint, open_checkpoint
from triton_diffusion.loading.components import load_components
from triton_diffusion.request import GenerationRequest, example_request
from triton_diffusion.state import read_state

PROMPTS = ("x", "ein blauer Würfel 蓝色", "the small green square stands left of a large yellow triangle, " * 12)


def arguments(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    # One picture an output: of a single one, the pipeline samples latents for the first output alone.
    changed = {"image": images * request.num_outputs, "strength": request.strength} if images else {}
    return changed | guided_arguments(request)


class SD3Pair(Pair):
    """With the pipeline that changes a picture for requests that bring one."""

    def __init__(self, folder: Path, **components: None) -> None:
        """components: those that the checkpoint does without, which from_pretrained must be told."""
        load = functools.partial(StableDiffusion3Pipeline.from_pretrained, **components)
        super().__init__(folder, SimpleNamespace(from_pretrained=load), arguments)
        self._pipelines = (self.pipeline, StableDiffusion3Img2ImgPipeline(**self.pipeline.components))
        self._pipelines[1].set_progress_bar_config(disable=True)

    def reference(self, request: GenerationRequest, images: Sequence[Picture] = (), output_type: str = "latent") -> Any:
        self.pipeline = self._pipelines[bool(images)]
        # The pipelines share a noise scheduler, and this is left behind by strength.
        self.pipeline.scheduler.set_begin_index(0)
        return super().reference(request, images, output_type)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> SD3Pair:
    return SD3Pair(build_stable_diffusion_3_checkpoint(tmp_path_factory.mktemp("sd3")))


@pytest.fixture(scope="module")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> SD3Pair:
    """As 3.5 medium; its schedule is shifted by the size of the picture, and there is no T5."""
    folder = tmp_path_factory.mktemp("sd35")
    build_stable_diffusion_3_checkpoint(folder, with_t5=False, is_3_5=True, dynamic_shift=True)
    return SD3Pair(folder, text_encoder_3=None, tokenizer_3=None)


@pytest.fixture(scope="module")
def picture() -> Picture:
    """Of another size than what is drawn from it."""
    return np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)


def img2img(**values: Any) -> GenerationRequest:
    return make_request(**{"num_images": 1, "strength": 0.6, "num_inference_steps": 5} | values)


# Text to image.


@pytest.mark.parametrize(
    ("height", "width", "steps"), [(32, 32, 1), (24, 64, 4), (64, 20, 3), (4, 4, 2), (LARGEST_SIDE, 32, 2)]
)
def test_latents_equal_the_pipelines_at_every_size_and_step_count(
    sd3: SD3Pair, sd35: SD3Pair, height: int, width: int, steps: int
) -> None:
    request = make_request(height=height, width=width, num_inference_steps=steps)
    assert differs(sd3.check_latents(request), sd35.check_latents(request))


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
def test_latents_equal_the_pipelines_for_every_seed(sd3: SD3Pair, seed: int) -> None:
    assert differs(sd3.check_latents(make_request(seed=seed)), sd3.stages.latents(make_request()))


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "not ascii", "long"])
def test_latents_equal_the_pipelines_for_every_prompt(sd3: SD3Pair, sd35: SD3Pair, prompt: str) -> None:
    request = make_request(prompt=prompt, num_inference_steps=2)
    for pair in (sd3, sd35):
        other = pair.stages.latents(replace(request, prompt="a lighthouse"))
        assert differs(pair.check_latents(request), other)


def test_embeddings_stand_in_the_pipelines_order(sd3: SD3Pair, sd35: SD3Pair) -> None:
    """The transformer, which gives text no positions, would draw the same of any order."""
    request = make_request()
    for pair in (sd3, sd35):
        ours = load(pair.stages.encode("encoded", request))
        with torch.no_grad():
            embeds, _, pooled, _ = pair.pipeline.encode_prompt(
                *[request.prompt] * 3, do_classifier_free_guidance=False, max_sequence_length=24
            )
        assert_close(ours["prompt_embeds"], embeds)
        assert_close(ours["pooled_prompt_embeds"], pooled)


@pytest.mark.parametrize("negative_prompt", ["blurry, dark, low quality", ""])
def test_guidance_equals_the_pipelines(sd3: SD3Pair, sd35: SD3Pair, negative_prompt: str) -> None:
    request = make_request(guidance_scale=4.0, negative_prompt=negative_prompt)
    for pair in (sd3, sd35):
        guided = pair.check_latents(request)
        assert differs(guided, pair.stages.latents(replace(request, guidance_scale=3.0)))
        assert differs(guided, pair.stages.latents(replace(request, negative_prompt="two black cats")))


@pytest.mark.parametrize("max_sequence_length", [1, 48, 512])
def test_max_sequence_length_is_followed(sd3: SD3Pair, sd35: SD3Pair, max_sequence_length: int) -> None:
    """Without T5, so many zeros take its place."""
    for pair in (sd3, sd35):
        drawn = pair.check_latents(make_request(max_sequence_length=max_sequence_length, num_inference_steps=2))
        assert differs(drawn, pair.stages.latents(make_request(num_inference_steps=2)))


def test_a_flow_shift_equals_the_pipeline_of_such_a_checkpoint(sd3: SD3Pair) -> None:
    request = make_request(flow_shift=1.5)
    scheduler = sd3.pipeline.scheduler
    for pipeline in sd3._pipelines:
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, shift=1.5)
    try:
        shifted = sd3.check_latents(request)
    finally:
        for pipeline in sd3._pipelines:
            pipeline.scheduler = scheduler
    assert differs(shifted, sd3.stages.latents(replace(request, flow_shift=None)))


def test_outputs_equal_the_pipelines_with_one_generator_each(sd3: SD3Pair) -> None:
    latents = sd3.check_latents(make_request(num_outputs=2, guidance_scale=2.0))
    assert differs(latents[0], latents[1])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_pixels_are_within_one_of_the_pipelines(sd3: SD3Pair, height: int, width: int) -> None:
    sd3.check_pictures(make_request(height=height, width=width, num_outputs=2, guidance_scale=3.0))


# Image to image.


@pytest.mark.parametrize("strength", [0.05, 0.55, 0.6, 1.0])
def test_a_changed_picture_equals_the_pipelines_at_every_strength(
    sd3: SD3Pair, sd35: SD3Pair, picture: Picture, strength: float
) -> None:
    """Of 5 steps, 0.55 leaves 3: where it does not come out even, a step more."""
    request = img2img(strength=strength)
    for pair in (sd3, sd35):
        drawn = pair.check_latents(request, [picture])
        assert differs(drawn, pair.stages.latents(replace(request, strength=0.3), images=[picture]))
        if strength < 1:
            assert differs(drawn, pair.stages.latents(request, images=[255 - picture]))


def test_changed_outputs_equal_the_pipelines_and_those_drawn_alone(sd3: SD3Pair, picture: Picture) -> None:
    request = img2img(num_outputs=2, guidance_scale=3.0, negative_prompt="dark", height=24, width=40)
    together = sd3.check_latents(request, [picture])
    for index, seed in enumerate(request.output_seeds):
        alone = sd3.stages.latents(replace(request, num_outputs=1, seed=seed), images=[picture])
        assert_close(together[index : index + 1], alone)


def test_pixels_of_a_changed_picture_are_within_one_of_the_pipelines(sd3: SD3Pair, picture: Picture) -> None:
    sd3.check_pictures(img2img(guidance_scale=3.0, num_outputs=2), [picture])


# Batches.


def test_rows_of_all_kinds_at_different_steps_are_drawn_as_they_are_alone(
    sd3: SD3Pair, sd35: SD3Pair, picture: Picture
) -> None:
    requests = {
        "plain": make_request(num_inference_steps=4, seed=1, num_outputs=2),
        "guided": make_request(num_inference_steps=3, seed=2, guidance_scale=4.0, prompt=PROMPTS[2]),
        "changed": img2img(seed=3, prompt="two black cats", guidance_scale=2.0),
        "shorter": make_request(num_inference_steps=2, seed=4, prompt="x"),
    }
    joins = {"plain": 0, "guided": 1, "changed": 1, "shorter": 2}
    for pair in (sd3, sd35):
        pair.check_batch(requests, joins, {"changed": [picture]})


# Warnings, limits and defaults.


def test_a_prompt_that_is_cut_leaves_a_warning_that_names_the_encoder(sd3: SD3Pair, sd35: SD3Pair) -> None:
    request = make_request(prompt=PROMPTS[2], max_sequence_length=16)
    (warning,) = read_state(sd3.stages.encode("cut", request)).warnings
    assert "max_sequence_length=16" in warning
    assert f"CLIP, which sets the general direction, reads {CLIP_TOKENS}" in warning
    (warning,) = read_state(sd35.stages.encode("cut", request)).warnings
    assert f"cut to the {CLIP_TOKENS} that CLIP reads" in warning
    assert not read_state(sd3.stages.encode("fits", make_request(prompt="two black cats"))).warnings


def test_a_picture_beyond_the_positions_that_were_learnt_is_refused(sd3: SD3Pair) -> None:
    with pytest.raises(InvalidRequestError, match=f"must be at most {LARGEST_SIDE}"):
        sd3.stages.latents(make_request(height=LARGEST_SIDE + 4))


def test_defaults_are_those_of_pipeline_and_checkpoint(sd3: SD3Pair, sd35: SD3Pair) -> None:
    defaults = sd3.stages.family.defaults(sd3.stages.checkpoint)
    assert (defaults.height, defaults.width, defaults.size_multiple) == (32, 32, 4)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.strength) == (28, 7.0, 0.6)
    assert (defaults.max_images, defaults.flow_shift) == (1, 3.0)
    assert sd35.stages.family.defaults(sd35.stages.checkpoint).flow_shift is None


def test_the_cost_counts_all_tokens_and_steps(sd3: SD3Pair) -> None:
    family, checkpoint = sd3.stages.family, sd3.stages.checkpoint
    request = example_request(family.defaults(checkpoint), num_inference_steps=10, strength=0.55, num_images=1)
    assert family.num_tokens(request, checkpoint) == 64 + CLIP_TOKENS + 256
    assert family.num_steps(request, checkpoint) == 6


def test_example_inputs_are_shaped_as_what_the_encoders_leave(sd3: SD3Pair, sd35: SD3Pair) -> None:
    request = make_request(max_sequence_length=40)
    for pair in (sd3, sd35):
        components = load_components(
            pair.stages.checkpoint, ("scheduler", "transformer"), dtype=torch.float32, device=torch.device("cpu")
        )
        examples = pair.stages.family.denoise.example_inputs(components, request)
        left = read_state(pair.stages.encode("r", request)).tensor_infos
        assert {name: tuple(tensor.shape) for name, tensor in examples.items()} == {
            name: info.shape for name, info in left.items()
        }


def test_degrees_that_do_not_divide_are_refused(sd3: SD3Pair, sd35: SD3Pair) -> None:
    family = sd3.stages.family
    with pytest.raises(ConfigurationError, match="tp_size=3 does not divide num_attention_heads=4"):
        family.check_parallel("denoising", sd3.stages.checkpoint, ParallelConfig(tp=3))
    with pytest.raises(ConfigurationError, match="tp_size=3 does not divide num_heads=2"):
        family.check_parallel("text_encoding", sd3.stages.checkpoint, ParallelConfig(tp=3))
    with pytest.raises(ConfigurationError, match="no tensor or sequence parallelism"):
        family.check_parallel("text_encoding", sd35.stages.checkpoint, ParallelConfig(tp=2))


def test_a_checkpoint_without_its_second_clip_is_refused(sd3: SD3Pair, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    index = (sd3.stages.checkpoint.path / "model_index.json").read_text()
    (broken / "model_index.json").write_text(index)
    checkpoint: Checkpoint = open_checkpoint(str(broken))
    with pytest.raises(ConfigurationError, match="copy the whole checkpoint"):
        sd3.stages.family.defaults(checkpoint)
