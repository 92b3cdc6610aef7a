"""Our stages against diffusers' HunyuanVideoPipeline on the same weights: same seed, same latents, same video."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from safetensors.torch import load
from transformers import PreTrainedTokenizerFast

from checkpoints import requests
from checkpoints.hunyuan_video import build_hunyuan_video_checkpoint
from checkpoints.parity import Pair, differs, distilled_arguments
from checkpoints.stages import InProcessStages
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.hunyuan_video import FAMILY
from triton_diffusion.families.hunyuan_video.family import TEMPLATE_TOKENS
from triton_diffusion.loading.checkpoint import Checkpoint, open_checkpoint
from triton_diffusion.request import GenerationRequest
from triton_diffusion.state import read_state

LONG_PROMPT = "the small green square stands left of a large yellow triangle, " * 8


def make_request(**values: Any) -> GenerationRequest:
    """A video of five frames in three steps."""
    return requests.make_request(**{"num_frames": 5, "num_inference_steps": 3} | values)


def arguments(request: GenerationRequest, _: list[Image.Image]) -> dict[str, Any]:
    return distilled_arguments(request, videos=True)


def make_pair(folder: Path) -> Pair:
    """The pipeline with the tokenizer that its checkpoint was made with; see the test of tokens below."""
    pair = Pair(folder, HunyuanVideoPipeline, arguments)
    pair.pipeline.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hunyuan_video_checkpoint(tmp_path_factory.mktemp("hunyuan-video"))


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return make_pair(folder)


@pytest.fixture(scope="module")
def plain(pair: Pair) -> torch.Tensor:
    """The latents of make_request()."""
    return pair.check_latents(make_request())


# Latents and videos.


@pytest.mark.parametrize(
    ("height", "width", "num_frames", "steps"), [(32, 32, 1, 1), (16, 48, 9, 2), (48, 32, 5, 4), (32, 16, 13, 2)]
)
def test_latents_equal_the_pipelines_at_every_size_length_and_step_count(
    pair: Pair, height: int, width: int, num_frames: int, steps: int
) -> None:
    request = make_request(height=height, width=width, num_frames=num_frames, num_inference_steps=steps)
    assert pair.check_latents(request).shape == (1, 4, (num_frames + 3) // 4, height // 4, width // 4)


@pytest.mark.parametrize("num_frames", [5, 25])
def test_frames_are_within_one_of_the_pipelines(pair: Pair, num_frames: int) -> None:
    """25 frames are decoded in two parts, which are blended."""
    request = make_request(height=32, width=48, num_frames=num_frames, num_outputs=2, num_inference_steps=2)
    video = pair.check_pictures(request).float()
    assert video.shape == (2, num_frames, 32, 48, 3)
    assert (video[:, 0] - video[:, -1]).abs().mean() > 5, "frames differ"


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_latents_equal_the_pipelines_for_every_seed(pair: Pair, plain: torch.Tensor, seed: int) -> None:
    assert differs(pair.check_latents(make_request(seed=seed)), plain)


def test_outputs_equal_the_pipelines_with_one_generator_each(pair: Pair) -> None:
    latents = pair.check_latents(make_request(num_outputs=2, guidance_scale=2.0, negative_prompt="dark"))
    assert differs(latents[0], latents[1])


# Text.


@pytest.mark.parametrize("prompt", ["x", "ein blauer Würfel 蓝色", "  two  black\tcats {} {0} \n", "<|eot_id|>"])
def test_latents_equal_the_pipelines_for_every_prompt(pair: Pair, plain: torch.Tensor, prompt: str) -> None:
    assert differs(pair.check_latents(make_request(prompt=prompt)), plain)


@pytest.mark.parametrize("max_sequence_length", [1, 5, 256])
def test_max_sequence_length_is_followed(pair: Pair, plain: torch.Tensor, max_sequence_length: int) -> None:
    """Room that the prompt does not need is masked, and changes nothing."""
    drawn = pair.check_latents(make_request(max_sequence_length=max_sequence_length))
    assert differs(drawn, plain) == (max_sequence_length < 24)


def test_a_prompt_that_is_too_long_is_cut_as_in_the_pipeline_and_leaves_a_warning(pair: Pair) -> None:
    request = make_request(prompt=LONG_PROMPT, max_sequence_length=16)
    cut = pair.check_latents(request)
    assert differs(cut, pair.check_latents(replace(request, max_sequence_length=128)))
    (warning,) = read_state(pair.stages.encode("r", request)).warnings
    num_tokens = len(pair.pipeline.tokenizer(LONG_PROMPT + "<|eot_id|>").input_ids)
    assert f"the prompt has {num_tokens} tokens and was cut to max_sequence_length=16" in warning
    assert "CLIP, which sets the general direction, reads 77 of its" in warning


def test_a_prompt_that_just_fits_leaves_no_warning(pair: Pair) -> None:
    prompt = "two black cats"
    num_tokens = len(pair.pipeline.tokenizer(prompt + "<|eot_id|>").input_ids)
    for max_sequence_length, num_warnings in ((num_tokens, 0), (num_tokens - 1, 1)):
        request = make_request(prompt=prompt, max_sequence_length=max_sequence_length)
        assert len(read_state(pair.stages.encode("r", request)).warnings) == num_warnings


def test_the_template_is_as_long_as_what_is_cut_off(pair: Pair) -> None:
    assert DEFAULT_PROMPT_TEMPLATE["crop_start"] == TEMPLATE_TOKENS
    in_front, _ = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    assert len(pair.pipeline.tokenizer(in_front).input_ids) == TEMPLATE_TOKENS, "of this checkpoint's tokenizer, too"


def test_tokens_are_those_of_the_checkpoints_file_whatever_class_it_names(pair: Pair, folder: Path) -> None:
    """The published checkpoint names LlamaTokenizerFast for LLaMA 3's tokens. transformers 5 then takes the rules of
    LLaMA 1 in their place, and so drops the spaces between words.
    """
    assert json.loads((folder / "model_index.json").read_text())["tokenizer"] == ["transformers", "LlamaTokenizerFast"]
    mask = load(pair.stages.encode("r", make_request(prompt="two black cats")))["prompt_attention_mask"]
    assert mask.sum() == len(["two", " black", " cats", "<|eot_id|>"])


# Guidance.


@pytest.mark.parametrize("negative_prompt", ["blurry, dark, low quality", ""])
def test_guidance_scale_is_the_pipelines_true_cfg_scale(pair: Pair, plain: torch.Tensor, negative_prompt: str) -> None:
    assert differs(pair.check_latents(make_request(guidance_scale=4.0, negative_prompt=negative_prompt)), plain)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_embedded_guidance_is_the_pipelines_guidance_scale(pair: Pair, plain: torch.Tensor, scale: float) -> None:
    assert differs(pair.check_latents(make_request(embedded_guidance_scale=scale)), plain)


def test_embedded_guidance_has_no_effect_without_guidance_embeds(tmp_path: Path) -> None:
    pair = make_pair(build_hunyuan_video_checkpoint(tmp_path / "undistilled", guidance_embeds=False))
    low, high = (pair.check_latents(make_request(embedded_guidance_scale=scale)) for scale in (1.0, 9.0))
    assert torch.equal(low, high)


# Schedules.


def test_flow_shift_replaces_the_checkpoints(pair: Pair, plain: torch.Tensor) -> None:
    request = make_request(flow_shift=3.0)
    drawn = pair.stages.latents(request)
    own = pair.pipeline.scheduler
    pair.pipeline.scheduler = type(own).from_config(own.config, shift=3.0)
    try:
        assert torch.allclose(drawn, pair.reference(request), atol=1e-4)
    finally:
        pair.pipeline.scheduler = own
    assert differs(drawn, plain)
    assert torch.equal(pair.stages.latents(make_request(flow_shift=7.0)), plain)


# Batches of rows at different steps.


def test_rows_at_different_steps_are_drawn_as_they_are_alone(pair: Pair) -> None:
    pair.check_batch(
        {
            "first": make_request(num_inference_steps=4, seed=1),
            "guided": make_request(num_inference_steps=2, seed=2, prompt="x", guidance_scale=3.0, num_outputs=2),
            "late": make_request(num_inference_steps=3, seed=3, prompt=LONG_PROMPT, embedded_guidance_scale=9.0),
        },
        {"first": 0, "guided": 1, "late": 2},
    )


def test_a_preview_is_the_first_frame(pair: Pair) -> None:
    request = make_request(num_inference_steps=3, preview_interval=2)
    pair.stages.admit("denoising", "watched", pair.stages.encode("watched", request))
    (_, done, _) = (pair.stages.tick("denoising", [("watched", 0)]) for _ in range(3))
    preview = load(pair.stages.run("decoding", "preview", done.previews["watched"]))["pictures"]
    assert preview.shape == (1, 32, 32, 3)
    assert preview.float().std() > 5


def test_bfloat16_draws_a_finite_video(folder: Path) -> None:
    stages = InProcessStages(folder, torch.bfloat16)
    request = make_request(guidance_scale=2.0, num_outputs=2)
    latents = stages.latents(request)
    assert latents.dtype == torch.bfloat16
    assert latents.isfinite().all()
    assert stages.pictures(request).shape == (2, 5, 32, 32, 3)


# Configuration.


def test_defaults_are_the_pipelines(checkpoint: Checkpoint) -> None:
    defaults = FAMILY.defaults(checkpoint)
    assert (defaults.height, defaults.width, defaults.size_multiple) == (720, 1280, 8)
    assert (defaults.num_frames, defaults.frame_step, defaults.fps) == (129, 4, 24.0)
    assert (defaults.num_inference_steps, defaults.flow_shift) == (50, 7.0)
    assert (defaults.guidance_scale, defaults.embedded_guidance_scale) == (1.0, 6.0)
    assert (defaults.max_sequence_length, defaults.longest_sequence_length) == (256, 512 - 95)


def test_a_row_costs_its_patches_and_its_prompt(checkpoint: Checkpoint) -> None:
    request = make_request(height=32, width=48, num_frames=9)
    assert FAMILY.num_tokens(request, checkpoint) == 24 + 3 * 4 * 6


@pytest.mark.parametrize(
    ("stage_model", "parallel", "message"),
    [
        ("denoising", ParallelConfig(tp=3), r"tp_size=3 does not divide num_attention_heads=4; use 1, 2, 4$"),
        ("denoising", ParallelConfig(ulysses=8), r"ulysses_degree=8 .*num_attention_heads=4; use 1, 2, 4; or ring"),
        ("text_encoding", ParallelConfig(tp=4), r"tp_size=4 does not divide num_key_value_heads=2; use 1, 2$"),
    ],
)
def test_degrees_that_do_not_divide_are_refused(
    checkpoint: Checkpoint, stage_model: str, parallel: ParallelConfig, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FAMILY.check_parallel(stage_model, checkpoint, parallel)


def test_a_schedule_that_the_pipeline_cannot_shift_is_refused(tmp_path: Path, folder: Path) -> None:
    for name in ("scheduler", "transformer", "vae", "text_encoder"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "model_index.json").symlink_to(folder / "model_index.json")
    (tmp_path / "scheduler").unlink()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"use_dynamic_shifting": true}')
    with pytest.raises(ConfigurationError, match=r"use_dynamic_shifting=true, .* set it to false"):
        FAMILY.defaults(open_checkpoint(str(tmp_path)))
