"""Our stages against diffusers' FluxPipeline on the same weights: same seed, same latents, same picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load

from checkpoints.parity import Pair, assert_close, differs, distilled_arguments
from checkpoints.requests import make_blob, make_request
from checkpoints.stages import InProcessStages
from triton_diffusion.request import GenerationRequest
from triton_diffusion.state import read_state

LONG_PROMPT = "the small green square stands left of a large yellow triangle, " * 12


def flux_arguments(request: GenerationRequest, _: list[Image.Image]) -> dict[str, Any]:
    return distilled_arguments(request)


def flux_pair(folder: Path) -> Pair:
    return Pair(folder, FluxPipeline, flux_arguments)


@pytest.fixture(scope="module")
def flux(flux_checkpoint: Path) -> Pair:
    return flux_pair(flux_checkpoint)


@pytest.fixture(scope="module")
def flux_dev(flux_dev_checkpoint: Path) -> Pair:
    return flux_pair(flux_dev_checkpoint)


@pytest.fixture(scope="module")
def flux_schnell(flux_schnell_checkpoint: Path) -> Pair:
    return flux_pair(flux_schnell_checkpoint)


# Latents and pictures.


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 64), (64, 20), (4, 4)])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_latents_equal_the_pipelines_at_every_size_and_step_count(
    flux: Pair, height: int, width: int, steps: int
) -> None:
    flux.check_latents(make_request(height=height, width=width, num_inference_steps=steps))


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])
def test_latents_equal_the_pipelines_for_every_seed(flux: Pair, seed: int) -> None:
    drawn = flux.check_latents(make_request(seed=seed))
    assert differs(drawn, flux.stages.latents(make_request(seed=17)))


@pytest.mark.parametrize(
    "prompt", ["a lighthouse at dusk, waves break on the rocks", "x", "ein blauer Würfel 蓝色", "  two  black\tcats \n"]
)
def test_latents_equal_the_pipelines_for_every_prompt(flux: Pair, prompt: str) -> None:
    drawn = flux.check_latents(make_request(prompt=prompt))
    assert differs(drawn, flux.stages.latents(make_request()))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 64), (64, 20)])
def test_pixels_are_within_one_of_the_pipelines(flux: Pair, height: int, width: int) -> None:
    request = make_request(height=height, width=width, num_outputs=2)
    assert flux.check_pictures(request).shape == (2, height, width, 3)


# Text.


def test_a_prompt_that_is_too_long_is_cut_as_in_the_pipeline(flux: Pair) -> None:
    request = make_request(prompt=LONG_PROMPT, max_sequence_length=16)
    cut = flux.check_latents(request)
    assert differs(cut, flux.stages.latents(replace(request, max_sequence_length=48)))


def test_a_prompt_that_is_cut_leaves_a_warning_with_both_lengths(flux: Pair) -> None:
    state = read_state(flux.stages.encode("r", make_request(prompt=LONG_PROMPT, max_sequence_length=16)))
    (warning,) = state.warnings
    assert "max_sequence_length=16" in warning
    num_tokens = len(flux.pipeline.tokenizer_2(LONG_PROMPT).input_ids)
    assert f"{num_tokens} tokens" in warning


def test_a_prompt_that_just_fits_leaves_no_warning(flux: Pair) -> None:
    prompt = "two black cats"
    num_tokens = len(flux.pipeline.tokenizer_2(prompt).input_ids)
    fitting = flux.stages.encode("r", make_request(prompt=prompt, max_sequence_length=num_tokens))
    assert read_state(fitting).warnings == []
    cut = flux.stages.encode("r", make_request(prompt=prompt, max_sequence_length=num_tokens - 1))
    assert len(read_state(cut).warnings) == 1


@pytest.mark.parametrize("max_sequence_length", [1, 5, 48, 512])
def test_max_sequence_length_is_followed(flux: Pair, max_sequence_length: int) -> None:
    flux.check_latents(make_request(max_sequence_length=max_sequence_length, num_inference_steps=2))


# Several outputs.


def test_outputs_equal_the_pipelines_with_one_generator_each(flux: Pair) -> None:
    latents = flux.check_latents(make_request(num_outputs=3))
    assert differs(latents[0], latents[1])


def test_an_output_can_be_drawn_again_alone_from_its_seed(flux: Pair) -> None:
    request = make_request(num_outputs=3, guidance_scale=2.5, negative_prompt="blurry")
    together = flux.stages.latents(request)
    for index, seed in enumerate(request.output_seeds):
        alone = flux.stages.latents(replace(request, num_outputs=1, seed=seed))
        assert_close(together[index : index + 1], alone)


# Guidance.


@pytest.mark.parametrize("negative_prompt", ["blurry, dark, low quality", ""])
def test_guidance_scale_with_a_negative_prompt_is_the_pipelines_true_cfg_scale(
    flux: Pair, negative_prompt: str
) -> None:
    request = make_request(guidance_scale=4.0, negative_prompt=negative_prompt)
    guided = flux.check_latents(request)
    assert differs(guided, flux.stages.latents(replace(request, guidance_scale=1.0)))


def test_guided_outputs_equal_the_pipelines(flux: Pair) -> None:
    flux.check_latents(make_request(guidance_scale=3.0, negative_prompt="dark", num_outputs=3))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, 30.0])
def test_embedded_guidance_is_the_pipelines_guidance_scale(flux_dev: Pair, scale: float) -> None:
    drawn = flux_dev.check_latents(make_request(embedded_guidance_scale=scale))
    assert differs(drawn, flux_dev.stages.latents(make_request(embedded_guidance_scale=8.0)))


def test_embedded_guidance_goes_together_with_guidance(flux_dev: Pair) -> None:
    flux_dev.check_latents(
        make_request(embedded_guidance_scale=2.0, guidance_scale=2.0, negative_prompt="low quality", num_outputs=2)
    )


def test_embedded_guidance_has_no_effect_without_guidance_embeds(flux: Pair) -> None:
    low, high = (flux.stages.latents(make_request(embedded_guidance_scale=scale)) for scale in (1.0, 9.0))
    assert torch.equal(low, high)


# Schedules.


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 128)])
def test_a_static_shift_equals_the_pipelines(flux_schnell: Pair, steps: int, height: int, width: int) -> None:
    flux_schnell.check_latents(make_request(num_inference_steps=steps, height=height, width=width))


def test_a_dynamic_shift_depends_on_the_size_and_equals_the_pipelines(flux: Pair, flux_schnell: Pair) -> None:
    """Both checkpoints have the same weights, so that only the schedule tells them apart."""
    request = make_request(height=64, width=128)
    assert differs(flux.check_latents(request), flux_schnell.check_latents(request))


# Batches of rows at different steps.


def test_rows_at_different_steps_are_drawn_as_they_are_alone(flux: Pair) -> None:
    requests = {
        "first": make_request(num_inference_steps=9, seed=1),
        "short": make_request(num_inference_steps=2, seed=2, prompt="two black cats"),
        "late": make_request(num_inference_steps=5, seed=3, prompt="a lighthouse"),
    }
    results = flux.stages.run_batched(requests, {"first": 0, "short": 1, "late": 2})
    for request_id, request in requests.items():
        assert_close(results[request_id], flux.reference(request))


def test_guided_and_unguided_rows_share_a_batch(flux_dev: Pair) -> None:
    requests = {
        "plain": make_request(num_inference_steps=6, seed=1, num_outputs=2),
        "guided": make_request(num_inference_steps=4, seed=2, guidance_scale=4.0, negative_prompt="dark"),
        "other": make_request(num_inference_steps=3, seed=3, embedded_guidance_scale=1.5),
        "both": make_request(
            num_inference_steps=5, seed=4, guidance_scale=2.0, embedded_guidance_scale=7.0, num_outputs=2
        ),
    }
    results = flux_dev.stages.run_batched(requests, {"plain": 0, "guided": 1, "other": 1, "both": 2})
    for request_id, request in requests.items():
        assert_close(results[request_id], flux_dev.reference(request))


def test_one_tick_of_all_steps_equals_a_tick_a_step(flux: Pair) -> None:
    request = make_request(num_inference_steps=6, guidance_scale=2.0, num_outputs=2)
    stepwise = flux.stages.run_batched({"stepwise": request}, {"stepwise": 0})["stepwise"]
    assert torch.equal(stepwise, flux.stages.latents(request))


def test_a_request_that_reuses_an_id_is_drawn_from_its_own_prompt(flux: Pair) -> None:
    """The stacked conditioning of the last batch is kept while its rows stay; an equal id is not the same row."""
    first, second = make_request(prompt="two black cats"), make_request(prompt="a lighthouse at dusk")
    flux.stages.latents(first, "same")
    assert_close(flux.stages.latents(second, "same"), flux.reference(second))


def test_prompts_encoded_together_equal_those_encoded_alone(flux: Pair) -> None:
    requests = {
        "a": make_request(prompt="two black cats"),
        "b": make_request(prompt="a lighthouse", guidance_scale=2.0, negative_prompt="dark"),
        "c": make_request(prompt="two black cats", guidance_scale=2.0),
    }
    alone = {request_id: load(flux.stages.encode(request_id, request)) for request_id, request in requests.items()}
    for request_id, request in requests.items():
        flux.stages.admit("text_encoding", request_id, make_blob(request_id, request))
    done = flux.stages.tick("text_encoding", [(request_id, 0) for request_id in requests])
    for request_id, expected in alone.items():
        together = load(done.results[request_id])
        assert together.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close(together[name], tensor)


def test_pictures_decoded_together_equal_those_decoded_alone(flux: Pair) -> None:
    requests = {"a": make_request(seed=1, num_outputs=2), "b": make_request(seed=2)}
    for request_id, request in requests.items():
        denoised = flux.stages.run("denoising", request_id, flux.stages.encode(request_id, request))
        flux.stages.admit("decoding", request_id, denoised)
    done = flux.stages.tick("decoding", [("a", 0), ("b", 0)])
    for request_id, request in requests.items():
        together = load(done.results[request_id])["pictures"].int()
        assert (together - flux.stages.pictures(request)).abs().max() <= 1


# Previews and bfloat16.


def test_previews_come_at_their_interval_and_decode(flux: Pair) -> None:
    request = make_request(num_inference_steps=7, preview_interval=2, num_outputs=2)
    flux.stages.admit("denoising", "watched", flux.stages.encode("watched", request))
    previews = {}
    for step in range(1, 8):
        done = flux.stages.tick("denoising", [("watched", 0), ("watched", 1)])
        if "watched" in done.previews:
            previews[step] = done.previews["watched"]
    assert list(previews) == [2, 4, 6]
    pictures = load(flux.stages.run("decoding", "preview", previews[4]))["pictures"]
    assert pictures.shape == (2, 32, 32, 3)
    assert pictures.float().std() > 5


def test_a_preview_does_not_change_the_picture(flux: Pair) -> None:
    request = make_request(num_inference_steps=5, preview_interval=1)
    assert torch.equal(flux.stages.latents(request), flux.stages.latents(replace(request, preview_interval=0)))


def test_the_preview_before_the_last_step_is_nearer_the_picture_than_the_first(flux: Pair) -> None:
    request = make_request(num_inference_steps=8, preview_interval=1)
    final = flux.stages.latents(request)
    flux.stages.admit("denoising", "nearing", flux.stages.encode("nearing", request))
    distances = []
    for _ in range(7):
        preview = load(flux.stages.tick("denoising", [("nearing", 0)]).previews["nearing"])["latents"]
        distances.append((preview - final).abs().mean().item())
    flux.stages.executors["denoising"].drop("nearing")
    assert distances[-1] < 0.5 * distances[0]


def test_bfloat16_draws_a_finite_picture(flux_dev: Pair, flux_dev_checkpoint: Path) -> None:
    stages = InProcessStages(flux_dev_checkpoint, torch.bfloat16)
    request = make_request(guidance_scale=2.0, num_outputs=2)
    latents = stages.latents(request)
    assert latents.dtype == torch.bfloat16
    assert latents.isfinite().all()
    assert stages.pictures(request).shape == (2, 32, 32, 3)
