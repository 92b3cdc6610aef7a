"""Pictures in: our stages against diffusers' FluxImg2ImgPipeline and FluxKontextPipeline on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image
from safetensors.torch import load

from checkpoints.flux import PIXELS_PER_TOKEN, build_flux_checkpoint
from checkpoints.parity import Pair, assert_close, differs, distilled_arguments
from checkpoints.requests import make_request
from checkpoints.stages import Picture
from triton_diffusion.families.flux import kontext as sizes
from triton_diffusion.request import GenerationRequest
from triton_diffusion.state import read_state

SMALL_SIZES = ((56, 24), (42, 34), (36, 36), (34, 42), (24, 56))
"""(height, width) that stand for the real ones, which are large for a test; some are no multiple of a token."""


def changing(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    """One picture an output: of a single one, the pipeline samples latents for the first output alone."""
    changed = {"image": images * request.num_outputs, "strength": request.strength} if images else {}
    return distilled_arguments(request) | changed


def beside(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    """The pipeline draws a picture of max_area, whatever size is asked for."""
    return distilled_arguments(request) | {
        "image": images[0] if images else None,
        "max_area": request.height * request.width,
    }


class FluxPair(Pair):
    """With the pipeline that changes a picture for requests that bring one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, FluxPipeline, changing)
        self._pipelines = (self.pipeline, FluxImg2ImgPipeline(**self.pipeline.components))
        self._pipelines[1].set_progress_bar_config(disable=True)

    def reference(self, request: GenerationRequest, images: Sequence[Picture] = (), output_type: str = "latent") -> Any:
        self.pipeline = self._pipelines[bool(images)]
        return super().reference(request, images, output_type)


@pytest.fixture(scope="module")
def flux(flux_checkpoint: Path) -> FluxPair:
    return FluxPair(flux_checkpoint)


@pytest.fixture(scope="module")
def flux_dev(flux_dev_checkpoint: Path) -> FluxPair:
    return FluxPair(flux_dev_checkpoint)


def build_kontext(folder: Path, **arguments: Any) -> Pair:
    build_flux_checkpoint(
        folder, guidance_embeds=True, dynamic_shift=True, pipeline_class="FluxKontextPipeline", **arguments
    )
    return Pair(folder, FluxKontextPipeline, beside)


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_kontext(tmp_path_factory.mktemp("kontext"))


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "PREFERRED_SIZES", SMALL_SIZES)
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(w, h) for h, w in SMALL_SIZES])


def draw_picture(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def img2img(**values: Any) -> GenerationRequest:
    return make_request(**{"num_images": 1, "strength": 0.6, "num_inference_steps": 5} | values)


def edit(**values: Any) -> GenerationRequest:
    return make_request(**{"num_images": 1, "num_inference_steps": 2} | values)


# Image to image.


@pytest.mark.parametrize("strength", [0.05, 0.55, 0.6, 1.0])
def test_a_changed_picture_equals_the_pipelines_at_every_strength(
    flux: FluxPair, flux_dev: FluxPair, strength: float
) -> None:
    """Of 5 steps, 0.55 leaves 3: where it does not come out even, a step more."""
    request, picture = img2img(strength=strength), draw_picture(45, 70)
    for pair in (flux, flux_dev):
        drawn = pair.check_latents(request, [picture])
        assert differs(drawn, pair.stages.latents(replace(request, strength=0.3), images=[picture]))
        if strength < 1:
            assert differs(drawn, pair.stages.latents(request, images=[255 - picture]))


@pytest.mark.parametrize(("height", "width", "seed"), [(24, 64, 1), (4, 8, 2**63 - 2)])
def test_changed_outputs_equal_the_pipelines_and_those_drawn_alone(
    flux_dev: FluxPair, height: int, width: int, seed: int
) -> None:
    request = img2img(height=height, width=width, seed=seed, num_outputs=2, guidance_scale=2.0, negative_prompt="dark")
    picture = draw_picture(31, 30)
    together = flux_dev.check_latents(request, [picture])
    for index, output_seed in enumerate(request.output_seeds):
        alone = flux_dev.stages.latents(replace(request, num_outputs=1, seed=output_seed), images=[picture])
        assert_close(together[index : index + 1], alone)


def test_pixels_of_a_changed_picture_are_within_one_of_the_pipelines(flux: FluxPair) -> None:
    flux.check_pictures(img2img(num_outputs=2), [draw_picture(32, 32)])


def test_changed_and_new_pictures_share_their_batches(flux_dev: FluxPair) -> None:
    requests = {
        "new": make_request(num_inference_steps=4, seed=1, num_outputs=2),
        "changed": img2img(seed=2, guidance_scale=2.0, num_outputs=2),
        "hardly": img2img(seed=3, strength=0.2, prompt="two black cats", embedded_guidance_scale=1.5),
    }
    pictures = {"changed": [draw_picture(40, 20)], "hardly": [draw_picture(32, 32)]}
    flux_dev.check_batch(requests, {"new": 0, "changed": 1, "hardly": 2}, pictures)


# Kontext.


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 64), (40, 8)])
@pytest.mark.parametrize("shape", [(45, 70), (36, 36), (90, 7), (20, 19)])
@pytest.mark.usefixtures("small_sizes")
def test_a_picture_beside_equals_the_pipelines_at_every_size(
    kontext: Pair, height: int, width: int, shape: tuple[int, int]
) -> None:
    request, picture = edit(height=height, width=width), draw_picture(*shape)
    drawn = kontext.check_latents(request, [picture])
    assert differs(drawn, kontext.stages.latents(request, images=[255 - picture]))


@pytest.mark.parametrize("prompt", ["x", "ein blauer Würfel 蓝色", "two black cats sleep under a table, " * 9])
@pytest.mark.usefixtures("small_sizes")
def test_every_knob_acts_beside_a_picture_as_in_the_pipeline(kontext: Pair, prompt: str) -> None:
    request = edit(prompt=prompt, num_outputs=2, guidance_scale=2.0, negative_prompt="dark", num_inference_steps=3)
    picture = draw_picture(45, 70)
    drawn = kontext.check_latents(request, [picture])
    for changed in (
        {"prompt": "a lighthouse"},
        {"negative_prompt": "blurry"},
        {"guidance_scale": 1.0},
        {"embedded_guidance_scale": 9.0},
        {"seed": 17},
        {"num_inference_steps": 2},
    ):
        assert differs(drawn, kontext.stages.latents(replace(request, **changed), images=[picture])), changed


def test_kontext_draws_without_a_picture(kontext: Pair) -> None:
    kontext.check_latents(make_request(height=24, width=40))


@pytest.mark.usefixtures("small_sizes")
def test_pixels_beside_a_picture_are_within_one_of_the_pipelines(kontext: Pair) -> None:
    kontext.check_pictures(edit(height=24, width=40, num_outputs=2), [draw_picture(45, 70)])


@pytest.mark.usefixtures("small_sizes")
def test_rows_with_pictures_at_different_steps_are_drawn_as_they_are_alone(kontext: Pair) -> None:
    requests = {
        "first": edit(num_inference_steps=4, seed=1, num_outputs=2),
        "guided": edit(num_inference_steps=3, seed=2, guidance_scale=3.0, negative_prompt="dark"),
        "late": edit(seed=3, prompt="two black cats", embedded_guidance_scale=1.5),
    }
    pictures = {name: [draw_picture(40 + index, 60, index)] for index, name in enumerate(requests)}
    kontext.check_batch(requests, {"first": 0, "guided": 1, "late": 2}, pictures)


@pytest.mark.usefixtures("small_sizes")
def test_pictures_of_other_proportions_share_no_batch(kontext: Pair) -> None:
    """Turned on its side, a picture has as many tokens, but at other positions."""

    def key(name: str, request: GenerationRequest, pictures: Sequence[Picture] = ()) -> str:
        infos = read_state(kontext.stages.encode(name, request, pictures)).tensor_infos
        return kontext.stages.family.batch_key("denoising", request, infos)

    upright, flat = key("a", edit(), [draw_picture(60, 20)]), key("b", edit(), [draw_picture(20, 60)])
    assert upright == key("c", edit(seed=1), [draw_picture(61, 20, 1)])
    assert len({upright, flat, key("d", make_request())}) == 3


def test_a_picture_is_resized_to_the_sizes_that_kontext_was_trained_on(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With an autoencoder that leaves little of so many pixels."""
    pair = build_kontext(tmp_path_factory.mktemp("deep-kontext"), vae_levels=6)
    request, picture = edit(height=64, width=128), draw_picture(300, 440)
    blob = pair.stages.encode("sized", request, [picture])
    assert read_state(blob).tensor_infos["image_latents"].shape == (1, 4, 832 // 32, 1216 // 32)
    drawn = load(pair.stages.run("denoising", "sized", blob))["latents"]
    assert_close(drawn, pair.reference(request, [picture]))
    assert differs(drawn, pair.stages.latents(replace(request, num_images=0)))


# Defaults and cost.


def test_the_preferred_sizes_are_those_of_diffusers() -> None:
    theirs = {(height, width) for width, height in pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS}
    assert set(sizes.PREFERRED_SIZES) == theirs
    assert len(sizes.PREFERRED_SIZES) == len(pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS)


@pytest.mark.parametrize(
    ("shape", "expected"), [((1000, 1000), (1024, 1024)), ((1080, 1920), (752, 1392)), ((900, 300), (1568, 672))]
)
def test_kontext_draws_in_the_proportions_of_its_picture(
    kontext: Pair, flux: FluxPair, shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    stages = kontext.stages
    defaults = stages.family.defaults(stages.checkpoint)
    assert stages.family.default_size(defaults, [shape]) == expected
    assert stages.family.default_size(defaults, []) == (32, 32)
    others = flux.stages.family.defaults(flux.stages.checkpoint)
    assert flux.stages.family.default_size(others, [shape]) == (32, 32), "img2img draws in its own size"


def test_defaults_are_those_of_the_pipelines(flux: FluxPair, kontext: Pair) -> None:
    defaults = flux.stages.family.defaults(flux.stages.checkpoint)
    assert (defaults.strength, defaults.min_images, defaults.max_images) == (0.6, 0, 1)
    defaults = kontext.stages.family.defaults(kontext.stages.checkpoint)
    assert (defaults.strength, defaults.min_images, defaults.max_images) == (None, 0, 1)
    assert (defaults.embedded_guidance_scale, defaults.num_inference_steps) == (3.5, 28)


def test_the_cost_counts_the_picture_beside_and_the_steps_that_are_left(flux: FluxPair, kontext: Pair) -> None:
    family = flux.stages.family
    changed = img2img(num_inference_steps=10, strength=0.55)
    assert family.num_steps(changed, flux.stages.checkpoint) == 6
    assert family.num_tokens(changed, flux.stages.checkpoint) == 24 + 64
    with_picture = family.num_tokens(edit(), kontext.stages.checkpoint)
    assert with_picture == 24 + 64 + (1024 // PIXELS_PER_TOKEN) ** 2
