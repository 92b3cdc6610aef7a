"""Our stages against diffusers' Wan pipelines on the same weights: same seed, same latents, same video."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import Image
from safetensors.torch import load

from checkpoints import requests
from checkpoints.parity import Pair, assert_close, differs, guided_arguments
from checkpoints.stages import InProcessStages, Picture
from checkpoints.wan import FLOW_SHIFT, Kind, build_wan_checkpoint
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.families.wan import FAMILY
from triton_diffusion.loading.checkpoint import Checkpoint, open_checkpoint
from triton_diffusion.request import GenerationRequest, example_request
from triton_diffusion.state import read_state

LONG_PROMPT = "the small green square stands left of a large yellow triangle, " * 8
NUM_IMAGES: dict[Kind, int] = {"t2v": 0, "i2v": 1, "first_last": 2, "experts": 0, "experts_i2v": 1, "ti2v": 0}
"""What each kind of checkpoint needs."""
WITH_CLIP = ("i2v", "first_last")

Pairs = Callable[..., "WanPair"]


def make_request(kind: Kind = "t2v", **values: Any) -> GenerationRequest:
    """A guided video of five frames in three steps, and 512 tokens where the pipeline breaks with fewer."""
    defaults = {
        "num_frames": 5,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "negative_prompt": "dark",
        "num_images": NUM_IMAGES[kind],
        "max_sequence_length": 512 if kind in WITH_CLIP else 24,
    }
    return requests.make_request(**defaults | values)


def make_pictures(count: int, *, seed: int = 0, size: tuple[int, int] = (40, 24)) -> list[Picture]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 255, (*size, 3), dtype=np.uint8) for _ in range(count)]


class WanPair(Pair):
    """Stages and the pipeline, which is asked for what the request says, its noise scheduler's shift included."""

    def __init__(self, folder: Path, pipeline_class: Any) -> None:
        super().__init__(folder, pipeline_class, self._of_request)

    def _of_request(self, request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
        if request.flow_shift is not None:
            scheduler = self.pipeline.scheduler
            name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
            self.pipeline.scheduler = scheduler.from_config(scheduler.config, **{name: request.flow_shift})
        given = {"guidance_scale_2": request.guidance_scale_2}
        given |= dict(zip(("image", "last_image"), images, strict=False))
        return guided_arguments(request, videos=True) | given


@pytest.fixture(scope="module", autouse=True)
def whole_pipeline() -> Any:
    """WanImageToVideoPipeline calls ftfy even where it is not installed; WanPipeline then goes without."""
    given = pipeline_wan_i2v.prompt_clean
    pipeline_wan_i2v.prompt_clean = pipeline_wan.prompt_clean
    yield
    pipeline_wan_i2v.prompt_clean = given


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Of a checkpoint, made when it is first asked for."""
    return functools.cache(
        lambda kind, euler=False: build_wan_checkpoint(tmp_path_factory.mktemp(f"wan-{kind}"), kind, euler=euler)
    )


@pytest.fixture(scope="module")
def pairs(folders: Callable[..., Path]) -> Pairs:
    """By kind of checkpoint; from_image: TI2V as the pipeline for pictures reads it."""

    @functools.cache
    def pair(kind: Kind, euler: bool, from_image: bool) -> WanPair:
        return WanPair(folders(kind, euler), WanImageToVideoPipeline if from_image else WanPipeline)

    return lambda kind, euler=False, from_image=False: pair(kind, euler, from_image or NUM_IMAGES[kind] > 0)


@pytest.fixture(scope="module")
def plain(pairs: Pairs) -> torch.Tensor:
    """The latents of make_request()."""
    return pairs("t2v").check_latents(make_request())


# Latents and videos.


@pytest.mark.parametrize(
    ("height", "width", "num_frames", "steps"), [(32, 32, 1, 1), (16, 48, 9, 2), (48, 32, 5, 4), (32, 16, 13, 6)]
)
def test_latents_equal_the_pipelines_at_every_size_length_and_step_count(
    pairs: Pairs, height: int, width: int, num_frames: int, steps: int
) -> None:
    request = make_request(height=height, width=width, num_frames=num_frames, num_inference_steps=steps)
    drawn = pairs("t2v").check_latents(request)
    assert drawn.shape == (1, 4, (num_frames + 3) // 4, height // 4, width // 4)


@pytest.mark.parametrize(("kind", "num_images"), [("t2v", 0), ("ti2v", 1)])
def test_frames_are_within_one_of_the_pipelines(pairs: Pairs, kind: Kind, num_images: int) -> None:
    request = make_request(kind, width=48, num_frames=13, num_outputs=2, num_inference_steps=1, num_images=num_images)
    video = pairs(kind, from_image=num_images > 0).check_pictures(request, make_pictures(num_images)).float()
    assert video.shape == (2, 13, 32, 48, 3)
    assert (video[:, 0] - video[:, -1]).abs().mean() > 5, "frames differ"


def test_one_frame_is_a_picture(pairs: Pairs) -> None:
    assert pairs("t2v").check_pictures(make_request(num_frames=1)).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_latents_equal_the_pipelines_for_every_seed(pairs: Pairs, plain: torch.Tensor, seed: int) -> None:
    assert differs(pairs("t2v").check_latents(make_request(seed=seed)), plain)


def test_outputs_equal_the_pipelines_with_one_generator_each(pairs: Pairs) -> None:
    latents = pairs("t2v").check_latents(make_request(num_outputs=3))
    assert differs(latents[0], latents[1])


# Text and guidance.


@pytest.mark.parametrize("prompt", ["x", "ein blauer Würfel 蓝色", "  two  black\tcats &amp;amp; \n"])
def test_latents_equal_the_pipelines_for_every_prompt(pairs: Pairs, plain: torch.Tensor, prompt: str) -> None:
    assert differs(pairs("t2v").check_latents(make_request(prompt=prompt)), plain)


def test_prompts_are_cleaned_before_they_are_looked_up(pairs: Pairs) -> None:
    stages = pairs("t2v").stages
    written, meant = (make_request(prompt=prompt) for prompt in ("two  cats&amp;lt;", "two cats<"))
    assert torch.equal(stages.latents(written), stages.latents(meant))


@pytest.mark.parametrize("max_sequence_length", [1, 100])
def test_max_sequence_length_is_followed(pairs: Pairs, plain: torch.Tensor, max_sequence_length: int) -> None:
    """Zeros behind the prompt are attended to, so even room that is not needed changes the video."""
    assert differs(pairs("t2v").check_latents(make_request(max_sequence_length=max_sequence_length)), plain)


def test_a_prompt_that_is_too_long_is_cut_and_leaves_a_warning(pairs: Pairs) -> None:
    request, pair = make_request(prompt=LONG_PROMPT, guidance_scale=1.0), pairs("t2v")
    assert differs(pair.check_latents(request), pair.stages.latents(replace(request, prompt=LONG_PROMPT[:60])))
    (warning,) = read_state(pair.stages.encode("r", request)).warnings
    num_tokens = len(pair.pipeline.tokenizer(LONG_PROMPT.strip()).input_ids)
    assert f"the prompt has {num_tokens} tokens and was cut to max_sequence_length=24" in warning
    fitting = replace(request, max_sequence_length=num_tokens)
    assert not read_state(pair.stages.encode("r", fitting)).warnings


@pytest.mark.parametrize("values", [{"negative_prompt": ""}, {"guidance_scale": 6.5}, {"guidance_scale": 1.0}])
def test_guidance_equals_the_pipelines(pairs: Pairs, plain: torch.Tensor, values: dict[str, Any]) -> None:
    assert differs(pairs("t2v").check_latents(make_request(**values)), plain)


# Schedules.


@pytest.mark.parametrize("euler", [False, True])
def test_both_noise_schedulers_and_their_shift_equal_the_pipelines(pairs: Pairs, euler: bool) -> None:
    pair = pairs("t2v", euler)
    drawn = {shift: pair.check_latents(make_request(flow_shift=shift)) for shift in (8.0, FLOW_SHIFT)}
    assert differs(drawn[8.0], drawn[FLOW_SHIFT])
    assert torch.equal(pair.stages.latents(make_request()), drawn[FLOW_SHIFT]), "it is the checkpoint's"


def test_the_noise_schedulers_differ(pairs: Pairs, plain: torch.Tensor) -> None:
    """Otherwise the test above could have run the same twice."""
    assert differs(pairs("t2v", True).stages.latents(make_request()), plain)


# Pictures.


@pytest.mark.parametrize(
    ("kind", "num_images"), [("i2v", 1), ("first_last", 2), ("experts_i2v", 1), ("experts_i2v", 2), ("ti2v", 1)]
)
def test_videos_from_pictures_equal_the_pipelines(pairs: Pairs, kind: Kind, num_images: int) -> None:
    pair = pairs(kind, from_image=True)
    request = make_request(kind, num_images=num_images, num_inference_steps=2)
    pictures, others = make_pictures(num_images), make_pictures(num_images, seed=1, size=(32, 50))
    drawn = pair.check_latents(request, pictures)
    assert differs(pair.check_latents(request, [others[0], *pictures[1:]]), drawn)
    if num_images == 2:
        assert differs(pair.check_latents(request, [pictures[0], others[1]]), drawn)
        assert differs(pair.stages.latents(request, images=pictures[::-1]), drawn)


@pytest.mark.parametrize("kind", ["experts_i2v", "ti2v"])
def test_outputs_from_one_picture_equal_the_pipelines(pairs: Pairs, kind: Kind) -> None:
    request = make_request(kind, num_outputs=2, num_images=1)
    latents = pairs(kind, from_image=True).check_latents(request, make_pictures(1))
    assert differs(latents[0], latents[1])


def test_outputs_with_clip_are_drawn_as_they_are_alone(pairs: Pairs) -> None:
    """The pipeline cannot: it repeats the embedding of the picture for prompts only."""
    pair, pictures = pairs("i2v"), make_pictures(1)
    together = pair.stages.latents(make_request("i2v", num_outputs=2), images=pictures)
    for index in range(2):
        alone = pair.reference(make_request("i2v", seed=7 + index), pictures)
        assert_close(together[index : index + 1], alone)


def test_a_shorter_text_beside_clip_is_padded_to_what_the_transformer_counts_on(pairs: Pairs) -> None:
    """It takes the last 512 tokens for text; the pipeline, given fewer, takes those of the picture for text."""
    pair, pictures = pairs("i2v"), make_pictures(1)
    request = make_request("i2v", max_sequence_length=7)
    embeds = pair.pipeline.encode_prompt(request.prompt, request.negative_prompt, max_sequence_length=7)
    padded = [torch.nn.functional.pad(part, (0, 0, 0, 512 - 7)) for part in embeds]
    theirs = pair.pipeline(
        image=Image.fromarray(pictures[0]),
        prompt_embeds=padded[0],
        negative_prompt_embeds=padded[1],
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).frames
    ours = pair.stages.latents(request, images=pictures)
    assert_close(ours, theirs)
    assert differs(ours, pair.stages.latents(make_request("i2v"), images=pictures))


def test_a_given_first_frame_stays_to_the_end(pairs: Pairs) -> None:
    stages, request = pairs("ti2v").stages, make_request("ti2v", num_images=1, num_inference_steps=6)
    given = load(stages.encode("r", request, make_pictures(1)))["first_frame"]
    drawn = stages.latents(request, images=make_pictures(1))
    assert_close(drawn[:, :, :1], given)
    assert differs(stages.latents(replace(request, num_images=0))[:, :, :1], given)


def test_two_pictures_need_two_frames(pairs: Pairs) -> None:
    request = make_request("first_last", num_frames=1)
    with pytest.raises(InvalidRequestError, match="num_frames=1 is fewer than the 2 pictures given"):
        pairs("first_last").stages.encode("r", request, make_pictures(2))


# Two transformers.


def test_each_step_is_made_by_the_expert_of_its_noise(pairs: Pairs) -> None:
    pair, calls = pairs("experts"), []
    components = pair.stages.executors["denoising"]._plan.on_tick._components
    hooks = [
        components[name].register_forward_pre_hook(
            lambda _, __, kwargs, name=name: calls.append((name, kwargs["timestep"].tolist())), with_kwargs=True
        )
        for name in FAMILY.denoisers
    ]
    pair.check_latents(make_request(num_inference_steps=4, guidance_scale=1.0))
    for hook in hooks:
        hook.remove()
    assert {name for name, _ in calls} == set(FAMILY.denoisers)
    assert all((name == "transformer") == (timesteps[0] >= 800) for name, timesteps in calls)


@pytest.mark.parametrize(("kind", "scale", "scale_2"), [("experts", 3.0, 6.0), ("experts_i2v", 4.0, 1.0)])
def test_each_expert_has_its_guidance_scale(pairs: Pairs, kind: Kind, scale: float, scale_2: float) -> None:
    pair, pictures = pairs(kind), make_pictures(NUM_IMAGES[kind])
    request = make_request(kind, num_inference_steps=4, guidance_scale=scale, guidance_scale_2=scale_2)
    drawn = pair.check_latents(request, pictures)
    for other in (None, scale):
        assert differs(drawn, pair.stages.latents(replace(request, guidance_scale_2=other), images=pictures))
    assert FAMILY.defaults(pair.stages.checkpoint).has_guidance_scale_2


# Batches of rows at different steps.


@pytest.mark.parametrize("kind", ["t2v", "experts_i2v", "first_last", "ti2v"])
def test_rows_at_different_steps_are_drawn_as_they_are_alone(pairs: Pairs, kind: Kind) -> None:
    num_images = NUM_IMAGES[kind] or int(kind == "ti2v")
    given = {"num_images": num_images}
    requests_ = {
        "long": make_request(kind, num_inference_steps=4, seed=1, **given),
        "plain": make_request(
            kind, num_inference_steps=2, seed=2, prompt="two black cats", guidance_scale=1.0, **given
        ),
        "late": make_request(kind, num_inference_steps=2, seed=3, prompt=LONG_PROMPT, guidance_scale=6.0, **given),
    }
    if "experts" in kind:
        requests_["late"] = replace(requests_["late"], guidance_scale_2=2.0)
    pictures = {name: make_pictures(num_images, seed=seed) for seed, name in enumerate(requests_)}
    joins = {"long": 0, "plain": 1, "late": 2}
    pairs(kind, from_image=num_images > 0).check_batch(requests_, joins, pictures)


# What the checkpoint says.


@pytest.mark.parametrize("kind", NUM_IMAGES)
def test_example_inputs_are_like_those_of_the_encoding_stages(pairs: Pairs, kind: Kind) -> None:
    stages, num_images = pairs(kind).stages, NUM_IMAGES[kind] or int(kind == "ti2v")
    request = make_request(kind, num_images=num_images, guidance_scale=1.0, num_inference_steps=1)
    real = load(stages.encode("r", request, make_pictures(num_images)))
    components = stages.executors["denoising"]._plan.on_tick._components
    examples = FAMILY.denoise.example_inputs(components, request)
    assert {name: tensor.shape for name, tensor in examples.items()} == {name: t.shape for name, t in real.items()}
    latents = FAMILY.decode.example_inputs(stages.executors["decoding"]._plan.on_tick._components, request)["latents"]
    assert latents.shape == stages.latents(request, images=make_pictures(num_images)).shape


@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_the_cost_is_the_length_of_the_transformers_sequence(pairs: Pairs, kind: Kind) -> None:
    stages, lengths = pairs(kind).stages, []
    transformer = stages.executors["denoising"]._plan.on_tick._components["transformer"]
    hook = transformer.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    request = make_request(kind, num_frames=9, width=48)
    stages.latents(request)
    hook.remove()
    assert set(lengths) == {FAMILY.num_tokens(request, stages.checkpoint)}


@pytest.mark.parametrize(
    ("kind", "images", "fps"),
    [
        ("t2v", (0, 0), 16),
        ("i2v", (1, 1), 16),
        ("first_last", (2, 2), 16),
        ("experts_i2v", (1, 2), 16),
        ("ti2v", (0, 1), 24),
    ],
)
def test_defaults_are_the_pipelines_own(
    folders: Callable[..., Path], kind: Kind, images: tuple[int, int], fps: float
) -> None:
    checkpoint = open_checkpoint(str(folders(kind)))
    defaults = FAMILY.defaults(checkpoint)
    assert (defaults.height, defaults.width, defaults.num_frames, defaults.frame_step) == (480, 832, 81, 4)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.max_sequence_length) == (50, 5.0, 512)
    assert (defaults.min_images, defaults.max_images) == images
    assert (defaults.fps, defaults.flow_shift, defaults.size_multiple) == (fps, FLOW_SHIFT, 16)
    assert ("image_encoding" in FAMILY.stage_components(checkpoint)) == (images[1] > 0)
    assert example_request(defaults).num_images == images[0]


def test_degrees_that_do_not_divide_are_refused_with_those_that_do(folders: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(folders("t2v")))
    with pytest.raises(ConfigurationError, match=r"tp_size=3 does not divide num_attention_heads=4 and ffn_dim=64; "):
        FAMILY.check_parallel("denoising", checkpoint, ParallelConfig(tp=3))
    with pytest.raises(ConfigurationError, match="2 ranks cannot share the tiles of a picture with vae_tiling=off"):
        FAMILY.check_tiles(2, "off")


def changed(folder: Path, target: Path, file: str, **values: Any) -> Checkpoint:
    """A copy of a checkpoint with other values in one of its files."""
    shutil.copytree(folder, target)
    config = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(config | values))
    return open_checkpoint(str(target))


def test_a_mixture_of_models_that_there_is_none_of_is_refused(folders: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = changed(folders("ti2v"), tmp_path / "wan", "model_index.json", boundary_ratio=0.9)
    for ask in (FAMILY.defaults, FAMILY.stage_components):
        with pytest.raises(ConfigurationError, match="expand_timesteps together with boundary_ratio"):
            ask(checkpoint)


def test_a_schedule_that_the_pipeline_cannot_shift_is_refused(folders: Callable[..., Path], tmp_path: Path) -> None:
    file = "scheduler/scheduler_config.json"
    checkpoint = changed(folders("t2v"), tmp_path / "wan", file, use_dynamic_shifting=True)
    with pytest.raises(ConfigurationError, match="use_dynamic_shifting=true"):
        FAMILY.defaults(checkpoint)


def test_older_autoencoders_do_not_say_their_compression(folders: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = changed(
        folders("t2v"), tmp_path / "wan", "vae/config.json", scale_factor_temporal=None, scale_factor_spatial=None
    )
    assert FAMILY.num_image_tokens(make_request(height=64, width=32, num_frames=9), checkpoint) == 3 * 4 * 2


def test_bfloat16_draws_finite_videos(folders: Callable[..., Path]) -> None:
    stages = InProcessStages(folders("ti2v"), torch.bfloat16)
    request = make_request("ti2v", num_images=1, num_outputs=2)
    latents = stages.latents(request, images=make_pictures(1))
    assert latents.dtype == torch.float32, "noise schedulers work in float32, as in the pipeline"
    assert latents.isfinite().all()
    assert stages.pictures(request, make_pictures(1)).shape == (2, 5, 32, 32, 3)
