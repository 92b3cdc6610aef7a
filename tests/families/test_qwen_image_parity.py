"""Our stages against diffusers' QwenImagePipeline and those that edit, on the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import load

from checkpoints.parity import Pair, assert_close, common_arguments, differs
from checkpoints.qwen_image import EditPipelines, build_qwen_image_checkpoint
from checkpoints.requests import make_blob, make_request
from checkpoints.stages import InProcessStages, Picture
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.families.qwen_image import FAMILY, encode, family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.request import GenerationRequest
from triton_diffusion.state import read_state

EDIT, EDIT_PLUS = "QwenImageEditPipeline", "QwenImageEditPlusPipeline"
LONG_PROMPT = "the small green square stands left of a large yellow triangle, " * 12
# Pictures that are edited have a million pixels, which would take minutes here; so both sides fit them to less.
SHRINK = 100
FITTED_SIZE, CALCULATE_DIMENSIONS = family.fitted_size, pipeline_qwenimage_edit_plus.calculate_dimensions


def arguments(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    guidance = {"negative_prompt": request.negative_prompt, "true_cfg_scale": request.guidance_scale}
    given = common_arguments(request) | guidance
    return given | ({"image": images if len(images) > 1 else images[0]} if images else {})


def picture(height: int, width: int, seed: int = 0) -> Picture:
    """Soft spots of colour."""
    spots = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(spots).resize((width, height)))


def edit_request(num_images: int = 1, **values: Any) -> GenerationRequest:
    return make_request(**{"num_inference_steps": 2, "num_images": num_images, **values})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors as small as these, threads cost more than they bring."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def small_pictures() -> Iterator[None]:
    """All areas that pictures are fitted to are smaller, in the pipelines and here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            theirs = module.calculate_dimensions
            patch.setattr(
                module, "calculate_dimensions", lambda area, ratio, theirs=theirs: theirs(area // SHRINK, ratio)
            )
        for module in (family, encode):
            patch.setattr(module, "fitted_size", lambda area, height, width: FITTED_SIZE(area // SHRINK, height, width))
        yield


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = build_qwen_image_checkpoint(tmp_path_factory.mktemp("qwen-image"))
    return Pair(folder, QwenImagePipeline, arguments)


def edit_pair(folder: Path, pipeline_class: str, **values: Any) -> Pair:
    build_qwen_image_checkpoint(folder, pipeline_class, halvings=2, **values)
    return Pair(folder, EditPipelines(pipeline_class), arguments)


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory, small_pictures: None) -> Pair:
    return edit_pair(tmp_path_factory.mktemp("edit"), EDIT)


@pytest.fixture(scope="module")
def edit_plus(tmp_path_factory: pytest.TempPathFactory, small_pictures: None) -> Pair:
    return edit_pair(tmp_path_factory.mktemp("edit-plus"), EDIT_PLUS)


# Text to image.


@pytest.mark.parametrize(("height", "width", "steps"), [(32, 32, 2), (24, 64, 3), (64, 20, 5), (4, 4, 4)])
def test_latents_equal_the_pipelines_at_every_size_and_step_count(
    qwen: Pair, height: int, width: int, steps: int
) -> None:
    qwen.check_latents(make_request(height=height, width=width, num_inference_steps=steps))


def test_one_step_is_refused_where_the_pipeline_divides_by_zero(qwen: Pair) -> None:
    with pytest.raises(InvalidRequestError, match="num_inference_steps=1"):
        qwen.stages.latents(make_request(num_inference_steps=1))


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_latents_equal_the_pipelines_for_every_seed(qwen: Pair, seed: int) -> None:
    drawn = qwen.check_latents(make_request(seed=seed))
    assert differs(drawn, qwen.stages.latents(make_request(seed=17)))


@pytest.mark.parametrize("prompt", ["x", "ein blauer Würfel 蓝色", "  two  black\tcats \n", "say {} and <|im_end|>"])
def test_latents_equal_the_pipelines_for_every_prompt(qwen: Pair, prompt: str) -> None:
    drawn = qwen.check_latents(make_request(prompt=prompt, num_inference_steps=2))
    assert differs(drawn, qwen.stages.latents(make_request(num_inference_steps=2)))


def test_pixels_are_within_one_of_the_pipelines(qwen: Pair) -> None:
    qwen.check_pictures(make_request(height=24, width=64, num_outputs=2))


def test_outputs_equal_the_pipelines_with_one_generator_each(qwen: Pair) -> None:
    latents = qwen.check_latents(make_request(num_outputs=2, guidance_scale=3.0, negative_prompt="dark"))
    assert differs(latents[0], latents[1])


@pytest.mark.parametrize("max_sequence_length", [1, 16, 1024])
def test_a_prompt_is_cut_at_max_sequence_length_as_in_the_pipeline(qwen: Pair, max_sequence_length: int) -> None:
    request = make_request(prompt=LONG_PROMPT, max_sequence_length=max_sequence_length, num_inference_steps=2)
    drawn = qwen.check_latents(request)
    assert differs(drawn, qwen.stages.latents(replace(request, max_sequence_length=48)))


def test_a_prompt_that_is_cut_leaves_a_warning_and_one_that_fits_does_not(qwen: Pair) -> None:
    num_tokens = len(qwen.pipeline.tokenizer(LONG_PROMPT).input_ids)
    fitting = make_request(prompt=LONG_PROMPT, max_sequence_length=num_tokens)
    assert read_state(qwen.stages.encode("fits", fitting)).warnings == []
    cut = replace(fitting, max_sequence_length=num_tokens - 1)
    (warning,) = read_state(qwen.stages.encode("cut", cut)).warnings
    assert f"{num_tokens} tokens" in warning
    assert f"max_sequence_length={num_tokens - 1}" in warning


def test_the_tokens_of_the_template_are_as_many_as_with_the_published_vocabulary(qwen: Pair, edit: Pair) -> None:
    """Else the comparisons above would not notice a prompt that is cut at a wrong place."""
    for pipeline in (qwen.pipeline, edit.pipeline):
        before = pipeline.prompt_template_encode.split("user\n")[0] + "user\n"
        assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize("negative_prompt", ["blurry, dark, low quality", ""])
def test_guidance_scale_with_a_negative_prompt_is_the_pipelines_true_cfg_scale(
    qwen: Pair, negative_prompt: str
) -> None:
    request = make_request(guidance_scale=4.0, negative_prompt=negative_prompt)
    guided = qwen.check_latents(request)
    assert differs(guided, qwen.stages.latents(replace(request, guidance_scale=1.0)))
    assert differs(guided, qwen.stages.latents(replace(request, guidance_scale=2.0)))
    assert differs(guided, qwen.stages.latents(replace(request, negative_prompt="two black cats")))


def test_guidance_leaves_each_token_as_long_as_the_conditional_prediction() -> None:
    conditional, unconditional = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(0))
    mixed = FAMILY.mix_guidance(conditional, unconditional, 4.0)
    assert torch.allclose(mixed.norm(dim=-1), conditional.norm(dim=-1))
    assert differs(mixed, conditional)


def test_rows_at_different_steps_with_prompts_of_different_lengths_are_drawn_as_they_are_alone(qwen: Pair) -> None:
    qwen.check_batch(
        {
            "first": make_request(num_inference_steps=4, seed=1, prompt="x"),
            "guided": make_request(num_inference_steps=3, seed=2, guidance_scale=4.0, negative_prompt="low quality"),
            "late": make_request(num_inference_steps=2, seed=3, prompt="two black cats", num_outputs=2),
        },
        {"first": 0, "guided": 1, "late": 2},
    )


def test_prompts_encoded_together_equal_those_encoded_alone(qwen: Pair) -> None:
    requests = {
        "a": make_request(prompt="x"),
        "b": make_request(prompt="a lighthouse at dusk", guidance_scale=2.0, negative_prompt="dark, low quality"),
        "c": make_request(prompt=LONG_PROMPT),
    }
    check_encoded_together(qwen, requests, {})


def check_encoded_together(
    pair: Pair, requests: dict[str, GenerationRequest], images: dict[str, list[Picture]]
) -> None:
    def blob(name: str) -> bytes:
        return make_blob(name, requests[name], images.get(name, ()))

    alone = {name: load(pair.stages.run("text_encoding", name, blob(name))) for name in requests}
    for name in requests:
        pair.stages.admit("text_encoding", name, blob(name))
    done = pair.stages.tick("text_encoding", [(name, 0) for name in requests])
    for name, expected in alone.items():
        together = load(done.results[name])
        assert together.keys() == expected.keys()
        for key, tensor in expected.items():
            assert_close(together[key], tensor)
    assert len({tensors["prompt_embeds"].shape for tensors in alone.values()}) > 1


# Editing.


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 24)])
@pytest.mark.parametrize("size", [(40, 60), (70, 33)])
def test_an_edited_picture_equals_the_pipelines_at_every_size(
    edit: Pair, size: tuple[int, int], height: int, width: int
) -> None:
    request = edit_request(height=height, width=width)
    drawn = edit.check_latents(request, [picture(*size)])
    assert differs(drawn, edit.stages.latents(request, images=[picture(*size, seed=1)]))


def test_an_edited_picture_is_guided_and_drawn_twice_as_in_the_pipeline(edit: Pair) -> None:
    request = edit_request(guidance_scale=3.0, negative_prompt="blurry", num_outputs=2)
    images = [picture(50, 50)]
    drawn = edit.check_latents(request, images)
    assert differs(drawn[0], drawn[1])
    assert differs(drawn, edit.stages.latents(replace(request, guidance_scale=1.0), images=images))
    edit.check_pictures(request, images)


def test_the_prompt_sees_the_picture(edit: Pair) -> None:
    """Apart from the latents of the picture, which the transformer sees in any case."""
    seen = [
        load(edit.stages.run("text_encoding", "r", make_blob("r", edit_request(), [picture(40, 60, seed)])))
        for seed in (0, 1)
    ]
    assert seen[0]["prompt_embeds"].shape == seen[1]["prompt_embeds"].shape
    assert differs(seen[0]["prompt_embeds"], seen[1]["prompt_embeds"])


def test_a_prompt_to_edit_is_not_cut_as_in_the_pipeline(edit: Pair) -> None:
    request = edit_request(prompt=LONG_PROMPT, max_sequence_length=4)
    drawn = edit.check_latents(request, [picture(40, 60)])
    assert differs(drawn, edit.stages.latents(replace(request, prompt=LONG_PROMPT[:60]), images=[picture(40, 60)]))


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_that_names_a_picture_which_is_not_there_is_refused(edit: Pair, field: str) -> None:
    request = edit_request(**{"guidance_scale": 2.0, field: "as in <|image_pad|>"})
    with pytest.raises(InvalidRequestError, match="image_pad"):
        edit.stages.latents(request, images=[picture(40, 60)])


def test_edits_of_several_pictures_share_batches_and_are_drawn_as_they_are_alone(edit: Pair) -> None:
    requests = {
        "first": edit_request(num_inference_steps=3, seed=1, prompt="x"),
        "guided": edit_request(num_inference_steps=2, seed=2, guidance_scale=4.0, negative_prompt="low quality"),
    }
    images = {"first": [picture(40, 60)], "guided": [picture(40, 60, seed=1)]}
    edit.check_batch(requests, {"first": 0, "guided": 1}, images)


def test_batches_are_shared_by_prompts_of_any_length_but_not_by_pictures_of_other_shapes(edit: Pair) -> None:
    """Also of as many tokens: their rotary embeddings differ."""

    def key(prompt: str, size: tuple[int, int]) -> str:
        request = edit_request(prompt=prompt)
        state = read_state(edit.stages.encode("r", request, [picture(*size)]))
        return FAMILY.batch_key("denoising", request, state.tensor_infos)

    assert key("x", (30, 60)) == key(LONG_PROMPT, (30, 61))
    assert key("x", (30, 60)) != key("x", (60, 30))


def test_prompts_with_pictures_encoded_together_equal_those_encoded_alone(edit_plus: Pair) -> None:
    requests = {"a": edit_request(prompt="x"), "b": edit_request(2, prompt=LONG_PROMPT, guidance_scale=2.0)}
    images = {"a": [picture(40, 60)], "b": [picture(90, 30, seed=1), picture(40, 40, seed=2)]}
    check_encoded_together(edit_plus, requests, images)


@pytest.mark.parametrize("sizes", [[(40, 60)], [(60, 40), (50, 50)], [(60, 40), (50, 50), (33, 60)]])
def test_several_pictures_equal_the_pipelines(edit_plus: Pair, sizes: list[tuple[int, int]]) -> None:
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    request = edit_request(len(images))
    drawn = edit_plus.check_latents(request, images)
    if len(images) > 1:
        assert differs(drawn, edit_plus.stages.latents(request, images=images[::-1]))
        assert differs(drawn, edit_plus.stages.latents(edit_request(1), images=images[:1]))


def test_guided_outputs_of_several_pictures_equal_the_pipelines(edit_plus: Pair) -> None:
    request = edit_request(2, guidance_scale=3.0, negative_prompt="dark", num_outputs=2)
    edit_plus.check_latents(request, [picture(60, 40), picture(50, 50, seed=1)])


def test_pictures_at_noise_level_zero_equal_the_pipelines(
    edit_plus: Pair, tmp_path: Path, small_pictures: None
) -> None:
    """As Qwen-Image-Edit-2511 sees them; the weights are those of `edit_plus`."""
    pair = edit_pair(tmp_path, EDIT_PLUS, zero_cond_t=True)
    requests = {
        "one": edit_request(2, seed=1, guidance_scale=3.0),
        "other": edit_request(2, seed=2, prompt="x"),
    }
    images = [picture(60, 40), picture(50, 50, seed=1)]
    pair.check_batch(requests, {"one": 0, "other": 0}, {"one": images, "other": images[::-1]})
    assert differs(
        pair.stages.latents(requests["one"], images=images), edit_plus.stages.latents(requests["one"], images=images)
    )


def test_bfloat16_draws_a_finite_picture(edit: Pair) -> None:
    stages = InProcessStages(edit.stages.checkpoint.path, torch.bfloat16)
    request = edit_request(guidance_scale=2.0)
    images = [picture(40, 60)]
    latents = stages.latents(request, images=images)
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - edit.stages.latents(request, images=images)).abs().mean() < 0.1
    assert stages.pictures(request, images).shape == (1, 32, 32, 3)


# What is read from the files.


@pytest.mark.parametrize("area", [1024 * 1024, 384 * 384])
def test_pictures_are_fitted_as_in_the_pipelines(area: int) -> None:
    for height, width in ((1, 1), (40, 60), (1000, 37), (37, 1000), (480, 640), (1080, 1920), (4096, 4095)):
        expected = CALCULATE_DIMENSIONS(area, width / height)
        assert FITTED_SIZE(area, height, width) == expected[::-1]


def test_a_picture_that_is_too_narrow_is_refused_before_anything_is_computed(edit: Pair) -> None:
    defaults = FAMILY.defaults(edit.stages.checkpoint)
    for size in ((1, 5000), (5000, 1), (10, 2000)):
        with pytest.raises(InvalidRequestError, match=f"{size[0]} x {size[1]} pixels"):
            FAMILY.default_size(defaults, [size])


def test_an_edited_picture_has_by_default_the_proportions_of_the_last_one(edit: Pair, edit_plus: Pair) -> None:
    """As the pipelines settle it, which is seen from what they draw."""
    for pair, sizes in ((edit, [(40, 60)]), (edit_plus, [(50, 50), (70, 30)])):
        defaults = FAMILY.defaults(pair.stages.checkpoint)
        height, width = FAMILY.default_size(defaults, sizes)
        images = [Image.fromarray(picture(*size)) for size in sizes]
        given = arguments(edit_request(len(sizes), num_inference_steps=2), images) | {"height": None, "width": None}
        assert pair.pipeline(**given).images[0].size == (width, height)
        assert height != width


def test_defaults_are_those_of_the_pipelines(qwen: Pair, edit: Pair, edit_plus: Pair) -> None:
    drawing, editing = (FAMILY.defaults(pair.stages.checkpoint) for pair in (qwen, edit))
    assert (drawing.height, drawing.width) == (256, 256)
    assert (editing.height, editing.width) == (1024, 1024)
    assert (drawing.num_inference_steps, drawing.guidance_scale, drawing.max_sequence_length) == (50, 4.0, 512)
    assert (drawing.min_images, drawing.max_images) == (0, 0)
    assert (editing.min_images, editing.max_images) == (1, 1)
    assert FAMILY.defaults(edit_plus.stages.checkpoint).max_images == 3


def test_edited_pictures_count_as_latents_and_as_tokens_of_the_prompt(edit: Pair) -> None:
    checkpoint = edit.stages.checkpoint
    assert FAMILY.num_tokens(edit_request(0), checkpoint) == 24 + 16
    one_picture = FAMILY.num_tokens(edit_request(1), checkpoint) - FAMILY.num_tokens(edit_request(0), checkpoint)
    assert one_picture == (1024 // 8) ** 2 + 1024 * 1024 // 28**2


@pytest.mark.parametrize("name", ["guidance_embeds", "use_additional_t_cond"])
def test_a_transformer_that_needs_more_than_the_pipeline_gives_is_refused(
    qwen: Pair, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(qwen.stages.checkpoint.path, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: True}))
    with pytest.raises(ConfigurationError, match=name):
        FAMILY.defaults(open_checkpoint(str(folder)))
