"""Our stages against diffusers' HunyuanVideoImageToVideoPipeline on the same weights: same seed, same latents."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from PIL import Image
from safetensors.torch import load
from transformers import PreTrainedTokenizerFast

from checkpoints import requests
from checkpoints.hunyuan_video import ImageCondition, build_hunyuan_image_to_video_checkpoint
from checkpoints.parity import Pair, assert_close, differs, distilled_arguments
from checkpoints.stages import InProcessStages, Picture
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.families.hunyuan_video import FAMILY
from triton_diffusion.families.hunyuan_video.family import PICTURE_TEMPLATE_TOKENS, PICTURE_TOKENS, PICTURE_TOKENS_KEPT
from triton_diffusion.families.hunyuan_video.picture_prompts import DEFAULT_PROMPT_TEMPLATE
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.request import GenerationRequest, example_request
from triton_diffusion.state import read_state

CONDITIONS: tuple[ImageCondition, ...] = get_args(ImageCondition)
LONG_PROMPT = "the small green square stands left of a large yellow triangle, " * 8
Pairs = Callable[[ImageCondition], "PicturePair"]


def make_request(**values: Any) -> GenerationRequest:
    """A video of nine frames, or five, in three steps, from a picture."""
    return requests.make_request(**{"num_frames": 9, "num_inference_steps": 3, "num_images": 1} | values)


def make_picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> list[Picture]:
    return [np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)]


class PicturePair(Pair):
    """Stages and the pipeline, of whose latents the first frame counts, too: it returns them without, in some cases."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, HunyuanVideoImageToVideoPipeline, self._of_request)
        # See the test of tokens in test_hunyuan_video_parity.py.
        self.pipeline.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self._latents: list[torch.Tensor] = []

    def reference(self, request: GenerationRequest, images: Sequence[Picture] = (), output_type: str = "latent") -> Any:
        result = super().reference(request, images or make_picture(), output_type)
        return self._latents[-1] if output_type == "latent" else result

    def check_latents(self, request: GenerationRequest, images: Sequence[Picture] = ()) -> torch.Tensor:
        return super().check_latents(request, images or make_picture())

    def _of_request(self, request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
        given = {"image": images[0], "callback_on_step_end": self._keep_latents}
        return distilled_arguments(request, videos=True) | given

    def _keep_latents(self, _: Any, __: int, ___: Any, given: dict[str, Any]) -> dict[str, Any]:
        self._latents = [given["latents"]]
        return {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ImageCondition], Path]:
    """Of each kind, made when it is first asked for."""
    make_folder = tmp_path_factory.mktemp
    return functools.cache(lambda kind: build_hunyuan_image_to_video_checkpoint(make_folder(kind), kind))


@pytest.fixture(scope="module")
def pairs(folders: Callable[[ImageCondition], Path]) -> Pairs:
    return functools.cache(lambda kind: PicturePair(folders(kind)))


@pytest.fixture(scope="module")
def plain(pairs: Pairs) -> Callable[[ImageCondition], torch.Tensor]:
    """The latents of make_request()."""
    return functools.cache(lambda kind: pairs(kind).check_latents(make_request()))


both_conditions = pytest.mark.parametrize("kind", CONDITIONS)


# Latents and videos.


@both_conditions
@pytest.mark.parametrize(("height", "width", "num_frames", "steps"), [(16, 48, 13, 2), (48, 32, 9, 1)])
def test_latents_equal_the_pipelines_at_every_size_length_and_step_count(
    pairs: Pairs, kind: ImageCondition, height: int, width: int, num_frames: int, steps: int
) -> None:
    request = make_request(height=height, width=width, num_frames=num_frames, num_inference_steps=steps)
    drawn = pairs(kind).check_latents(request)
    assert drawn.shape == (1, 4, (num_frames + 3) // 4, height // 4, width // 4)


@pytest.mark.parametrize(("kind", "num_frames"), [("latent_concat", 21), ("token_replace", 25)])
def test_frames_are_within_one_of_the_pipelines(pairs: Pairs, kind: ImageCondition, num_frames: int) -> None:
    """Where the picture is further channels, the pipeline leaves out the first four."""
    request = make_request(width=48, num_frames=num_frames, num_inference_steps=2)
    video = pairs(kind).check_pictures(request, make_picture()).float()
    assert video.shape == (1, num_frames - 4 * (kind == "latent_concat"), 32, 48, 3)
    assert (video[:, 0] - video[:, -1]).abs().mean() > 5, "frames differ"


@both_conditions
def test_another_picture_or_seed_is_another_video(
    pairs: Pairs, plain: Callable[[ImageCondition], torch.Tensor], kind: ImageCondition
) -> None:
    assert differs(pairs(kind).check_latents(make_request(), make_picture(1, (32, 50))), plain(kind))
    assert differs(pairs(kind).check_latents(make_request(seed=2**63 - 1)), plain(kind))


@both_conditions
def test_outputs_are_drawn_as_they_are_alone(pairs: Pairs, kind: ImageCondition) -> None:
    """The pipeline cannot: it encodes the picture once, and takes one for every generator."""
    pair = pairs(kind)
    request = make_request(num_outputs=2, guidance_scale=3.0, negative_prompt="dark")
    together = pair.stages.latents(request, images=make_picture())
    for index in range(2):
        assert_close(together[index : index + 1], pair.reference(replace(request, num_outputs=1, seed=7 + index)))


def test_a_first_frame_stays_to_the_end(pairs: Pairs) -> None:
    stages = pairs("token_replace").stages
    given = load(stages.encode("r", make_request(), make_picture()))["image_latents"]
    drawn = stages.latents(make_request(), images=make_picture())
    assert_close(drawn[:, :, :1], given)


@both_conditions
def test_a_preview_is_one_frame(pairs: Pairs, kind: ImageCondition) -> None:
    stages, request = pairs(kind).stages, make_request(preview_interval=2)
    stages.admit("denoising", "watched", stages.encode("watched", request, make_picture()))
    (_, done, _) = (stages.tick("denoising", [("watched", 0)]) for _ in range(3))
    preview = load(stages.run("decoding", "preview", done.previews["watched"]))["pictures"]
    assert preview.shape == (1, 32, 32, 3)


# Text.


@both_conditions
@pytest.mark.parametrize("prompt", ["x", "ein blauer Würfel 蓝色 {} \n", "a <|end_header_id|> b"])
def test_latents_equal_the_pipelines_for_every_prompt(
    pairs: Pairs, plain: Callable[[ImageCondition], torch.Tensor], kind: ImageCondition, prompt: str
) -> None:
    assert differs(pairs(kind).check_latents(make_request(prompt=prompt)), plain(kind))


@pytest.mark.parametrize("prompt", [LONG_PROMPT, "<|end_header_id|>" + LONG_PROMPT])
@pytest.mark.parametrize("max_sequence_length", [1, 5, 40])
def test_a_prompt_that_is_too_long_is_cut_as_in_the_pipeline(
    pairs: Pairs, prompt: str, max_sequence_length: int
) -> None:
    """With it the end of the template, in whose place four words of the prompt are cut off."""
    request = make_request(prompt=prompt, max_sequence_length=max_sequence_length, num_inference_steps=1)
    cut = pairs("token_replace").check_latents(request)
    assert differs(
        cut, pairs("token_replace").stages.latents(make_request(num_inference_steps=1), images=make_picture())
    )


def test_a_prompt_leaves_a_warning_only_if_it_does_not_fit(pairs: Pairs) -> None:
    pair = pairs("latent_concat")
    words = "two black cats"
    tail = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[1]
    num_tokens = len(pair.pipeline.tokenizer(words + tail, add_special_tokens=False).input_ids)
    for max_sequence_length, num_warnings in ((num_tokens, 0), (num_tokens - 1, 1)):
        request = make_request(prompt=words, max_sequence_length=max_sequence_length)
        assert len(read_state(pair.stages.encode("r", request, make_picture())).warnings) == num_warnings


def test_room_that_the_prompt_does_not_need_changes_nothing(pairs: Pairs) -> None:
    pair = pairs("token_replace")
    short, long = (pair.check_latents(make_request(max_sequence_length=length)) for length in (40, 256))
    assert not differs(short, long)


def test_the_template_is_the_pipelines(pairs: Pairs) -> None:
    tokenizer = pairs("latent_concat").pipeline.tokenizer
    in_front = tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]).input_ids
    assert len(in_front) == DEFAULT_PROMPT_TEMPLATE["crop_start"] == PICTURE_TEMPLATE_TOKENS
    assert in_front.index(tokenizer.convert_tokens_to_ids("<image>")) == DEFAULT_PROMPT_TEMPLATE["image_emb_start"]
    assert DEFAULT_PROMPT_TEMPLATE["image_emb_len"] == PICTURE_TOKENS


def test_words_that_stand_for_a_picture_are_refused(pairs: Pairs) -> None:
    stages = pairs("latent_concat").stages
    for values in ({"prompt": "a <image>"}, {"negative_prompt": "<image>", "guidance_scale": 2.0}):
        with pytest.raises(InvalidRequestError, match="a prompt has <image>, which stands for the picture; leave it"):
            stages.encode("r", make_request(**values), make_picture())


# Guidance.


@both_conditions
@pytest.mark.parametrize("negative_prompt", ["blurry, dark, low quality", "", make_request().prompt])
def test_guidance_steers_away_from_a_black_picture(
    pairs: Pairs, plain: Callable[[ImageCondition], torch.Tensor], kind: ImageCondition, negative_prompt: str
) -> None:
    """Also where the words are the same, which must not be taken from the cache of prompts."""
    request = make_request(guidance_scale=4.0, negative_prompt=negative_prompt)
    assert differs(pairs(kind).check_latents(request), plain(kind))


def test_embedded_guidance_is_the_pipelines_guidance_scale(
    pairs: Pairs, plain: Callable[[ImageCondition], torch.Tensor]
) -> None:
    request = make_request(embedded_guidance_scale=9.0)
    assert differs(pairs("token_replace").check_latents(request), plain("token_replace"))
    assert torch.equal(pairs("latent_concat").check_latents(request), plain("latent_concat")), "it has none"


# Batches of rows at different steps.


@both_conditions
def test_rows_at_different_steps_are_drawn_as_they_are_alone(pairs: Pairs, kind: ImageCondition) -> None:
    together = {
        "first": make_request(num_inference_steps=4, seed=1),
        "guided": make_request(num_inference_steps=2, seed=2, prompt="x", guidance_scale=3.0, negative_prompt="dark"),
        "late": make_request(num_inference_steps=3, seed=3, prompt=LONG_PROMPT, embedded_guidance_scale=9.0),
    }
    pictures = {name: make_picture(seed) for seed, name in enumerate(together)}
    pairs(kind).check_batch(together, {"first": 0, "guided": 1, "late": 2}, pictures)


@both_conditions
def test_bfloat16_draws_a_finite_video(folders: Callable[[ImageCondition], Path], kind: ImageCondition) -> None:
    stages = InProcessStages(folders(kind), torch.bfloat16)
    request = make_request(guidance_scale=2.0)
    assert stages.latents(request, images=make_picture()).isfinite().all()
    assert stages.pictures(request, make_picture()).shape[0] == 1


# Configuration.


@both_conditions
def test_example_inputs_are_like_those_of_the_encoding_stages(pairs: Pairs, kind: ImageCondition) -> None:
    stages, request = pairs(kind).stages, make_request()
    real = load(stages.encode("r", request, make_picture()))
    components = stages.executors["denoising"]._plan.on_tick._components
    examples = FAMILY.denoise.example_inputs(components, request)
    assert {name: tensor.shape for name, tensor in examples.items()} == {name: t.shape for name, t in real.items()}
    latents = FAMILY.decode.example_inputs(stages.executors["decoding"]._plan.on_tick._components, request)["latents"]
    assert latents.shape == stages.latents(request, images=make_picture()).shape


@both_conditions
def test_the_cost_is_the_length_of_the_transformers_sequence(pairs: Pairs, kind: ImageCondition) -> None:
    stages, lengths, request = pairs(kind).stages, set(), make_request(num_inference_steps=1)
    transformer = stages.executors["denoising"]._plan.on_tick._components["transformer"]
    hook = transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args: lengths.add(args[0].shape[1] + args[1].shape[1])
    )
    stages.latents(request, images=make_picture())
    hook.remove()
    assert lengths == {FAMILY.num_tokens(request, stages.checkpoint)}


@both_conditions
def test_defaults_are_the_pipelines(pairs: Pairs, kind: ImageCondition) -> None:
    checkpoint = pairs(kind).stages.checkpoint
    defaults = FAMILY.defaults(checkpoint)
    assert (defaults.height, defaults.width, defaults.num_frames, defaults.frame_step) == (720, 1280, 129, 4)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.flow_shift) == (50, 1.0, 7.0)
    assert defaults.embedded_guidance_scale == (6.0 if kind == "token_replace" else None)
    assert (defaults.min_images, defaults.max_images, example_request(defaults).num_images) == (1, 1, 1)
    assert (defaults.max_sequence_length, defaults.longest_sequence_length) == (256, 1024 - 103 - 575)
    assert PICTURE_TOKENS_KEPT == 288


def test_the_longest_sequence_is_just_within_what_llama_has_positions_for(pairs: Pairs) -> None:
    stages = pairs("latent_concat").stages
    longest = FAMILY.defaults(stages.checkpoint).longest_sequence_length
    lengths: list[int] = []
    llava = stages.executors["text_encoding"]._plan.on_tick._components["text_encoder"]
    hook = llava.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    stages.encode("r", make_request(prompt=LONG_PROMPT * 4, max_sequence_length=longest), make_picture())
    hook.remove()
    assert lengths == [1024]


def test_a_video_of_which_nothing_is_left_is_refused(pairs: Pairs) -> None:
    stages = pairs("latent_concat").stages
    for num_frames in (1, 5):
        with pytest.raises(InvalidRequestError, match=rf"num_frames={num_frames} must be at least 9 for this model"):
            stages.encode("r", make_request(num_frames=num_frames), make_picture())


def test_a_transformer_that_takes_no_picture_is_refused(
    folders: Callable[[ImageCondition], Path], tmp_path: Path
) -> None:
    folder = folders("latent_concat")
    (tmp_path / "model_index.json").symlink_to(folder / "model_index.json")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"in_channels": 16}')
    with pytest.raises(ConfigurationError, match=r"image_condition_type=None; .* needs one of latent_concat, token_re"):
        FAMILY.stage_components(open_checkpoint(str(tmp_path)))


def test_degrees_that_do_not_divide_llava_are_refused(pairs: Pairs) -> None:
    checkpoint = pairs("latent_concat").stages.checkpoint
    with pytest.raises(ConfigurationError, match=r"num_key_value_heads=2 and vision_config.num_attention_heads=2; use"):
        FAMILY.check_parallel("text_encoding", checkpoint, ParallelConfig(tp=4))


def test_what_a_configuration_inside_another_leaves_out_is_llamas(tmp_path: Path) -> None:
    """Published files were written by versions of transformers that left out the defaults of its class."""
    given = {"intermediate_size": 14336, "max_position_embeddings": 8192, "num_key_value_heads": 8}
    configs = {
        "model_index.json": {"_class_name": "HunyuanVideoImageToVideoPipeline"},
        "transformer/config.json": {"image_condition_type": "token_replace"},
        "text_encoder/config.json": {"text_config": given, "vision_config": {"num_attention_heads": 16}},
    }
    for name, config in configs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(config))
    assert FAMILY.head_counts("text_encoding", open_checkpoint(str(tmp_path))) == {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "hidden_size": 4096,
        "vision_config.num_attention_heads": 16,
    }
