"""Our stages against diffusers' GlmImagePipeline on the same weights: same seed, same prior, same picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline
from PIL import Image
from safetensors.torch import load

from checkpoints.glm_image import CODEBOOK_SIZE, IMAGE_END, IMAGE_START, build_glm_image_checkpoint
from checkpoints.parity import Pair, assert_close, common_arguments, differs
from checkpoints.requests import make_blob, make_request
from checkpoints.stages import Picture, alone
from triton_diffusion.errors import ConfigurationError, InvalidRequestError, StageError
from triton_diffusion.families.glm_image.family import FAMILY
from triton_diffusion.loading.checkpoint import Checkpoint, open_checkpoint
from triton_diffusion.request import GenerationRequest
from triton_diffusion.runtime.calibration import WarmUp
from triton_diffusion.state import read_state

PROMPT = "a sign that says 'open' above a blue star"


class GlmImagePair(Pair):
    """As Pair; priors are sampled once for equal inputs and seeds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, GlmImagePipeline, self._arguments_of)
        self.sampled: dict[Any, torch.Tensor] = {}
        components = self.stages.executors["prior_generation"]._plan.on_tick._components  # type: ignore[attr-defined]
        _mend(self.pipeline.vision_language_encoder)
        for model in (components["vision_language_encoder"], self.pipeline.vision_language_encoder):
            model.generate = self._remembering(model.generate)

    def _arguments_of(self, request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
        negative = {}
        if request.negative_prompt and request.guidance_scale > 1:
            # The pipeline takes no negative prompt, but its embeddings.
            length = request.max_sequence_length
            with torch.inference_mode():
                negative = {
                    "negative_prompt_embeds": self.pipeline._get_glyph_embeds([request.negative_prompt], length)
                }
        given = {"image": images or None, "guidance_scale": request.guidance_scale}
        return negative | common_arguments(request) | given

    def _remembering(self, generate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def remembered(**inputs: Any) -> torch.Tensor:
            values = {name: value.tolist() if torch.is_tensor(value) else value for name, value in inputs.items()}
            key = json.dumps([torch.initial_seed(), values], sort_keys=True)
            if key not in self.sampled:
                self.sampled[key] = generate(**inputs)
            return self.sampled[key]

        return remembered


def _mend(model: Any) -> None:
    """The pipeline asks for the features of pictures as they were in transformers 5.0: (tokens, channels), all in one
    tensor; since then there is a tensor (channels, height, width) for each, on which it fails.
    """
    features_of, tokens_of = model.get_image_features, model.get_image_tokens

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        output = features_of(*args, **kwargs)
        if not kwargs:  # by the pipeline, not by generate()
            output.pooler_output = [feature.flatten(1).T for feature in output.pooler_output]
        return output

    def get_image_tokens(features: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        parts = features.split(grids.prod(-1).tolist())
        sizes = [tuple(grid) for grid in grids[:, 1:].tolist()]
        tokens: torch.Tensor = tokens_of([part.T.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)])
        return tokens

    model.get_image_features, model.get_image_tokens = get_image_features, get_image_tokens


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> GlmImagePair:
    return GlmImagePair(build_glm_image_checkpoint(tmp_path_factory.mktemp("glm_image")))


def picture(seed: int, height: int = 32, width: int = 32) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def make(**values: Any) -> GenerationRequest:
    return make_request(**{"prompt": PROMPT, "guidance_scale": 2.0, "num_inference_steps": 2} | values)


def edit(num_images: int = 1, **values: Any) -> GenerationRequest:
    """A request with pictures, for which the prior samples a few tokens only."""
    return make(num_images=num_images, **values)


# Text to image.


@pytest.mark.parametrize(("height", "width", "steps"), [(32, 32, 1), (64, 32, 3)])
def test_latents_equal_the_pipelines(glm: GlmImagePair, height: int, width: int, steps: int) -> None:
    glm.check_latents(make(height=height, width=width, num_inference_steps=steps))


def test_the_prior_is_sampled_as_by_the_pipeline_and_leaves_torchs_random_numbers_alone(glm: GlmImagePair) -> None:
    request = make(prompt="two black cats", seed=2**63 - 1, height=64)
    state = torch.get_rng_state()
    ours = glm.stages.latents(request)
    assert torch.equal(torch.get_rng_state(), state)
    sampled = dict(glm.sampled)
    glm.sampled.clear()
    assert_close(ours, glm.reference(request))
    glm.sampled.update(sampled)


def test_prompt_and_seed_settle_the_prior(glm: GlmImagePair) -> None:
    requests = [make(height=64), make(height=64, seed=8), make(height=64, prompt="two black cats", seed=2**63 - 1)]
    priors = [load(glm.stages.encode("r", request))["prior_token_ids"].tolist() for request in requests]
    assert len({str(prior) for prior in priors}) == 3
    rows = torch.tensor(priors[0]).view(4, 2)
    assert torch.equal(rows[::2], rows[1::2]), "each token of the prior is 2 x 2 for the transformer"


def test_pixels_are_within_one_of_the_pipelines(glm: GlmImagePair) -> None:
    glm.check_pictures(make(num_outputs=2, height=64))


def test_all_outputs_have_the_prior_of_the_first_as_in_the_pipeline(glm: GlmImagePair) -> None:
    request = make(num_outputs=2)
    latents = glm.check_latents(request)
    assert differs(latents[0], latents[1])
    assert_close(latents[:1], glm.stages.latents(replace(request, num_outputs=1)))
    (warning,) = read_state(glm.stages.encode("r", request)).warnings
    assert "all 2 outputs have the prior of the first" in warning


# Words to be written.


@pytest.mark.parametrize(
    "prompt",
    [
        "no words at all",
        "'one'",
        "'one' and \"two\"",
        "“drei” 「四四四」 'fünf' \"six\" and " + "'a long one that goes on and on' " * 4,
    ],
)
def test_words_in_quotation_marks_are_encoded_as_by_the_pipeline(glm: GlmImagePair, prompt: str) -> None:
    request = edit(prompt=prompt, max_sequence_length=64)
    drawn = glm.check_latents(request, [picture(1)])
    assert differs(drawn, glm.stages.latents(edit(), images=[picture(1)]))


def test_words_that_are_too_long_are_cut_as_in_the_pipeline_with_a_warning(glm: GlmImagePair) -> None:
    request = edit(prompt="'a long word' and 'ab'", max_sequence_length=4)
    cut = glm.check_latents(request, [picture(1)])
    assert differs(cut, glm.stages.latents(replace(request, max_sequence_length=64), images=[picture(1)]))
    (warning,) = read_state(glm.stages.encode("r", request, [picture(1)])).warnings
    assert "12 tokens" in warning
    assert "max_sequence_length=4" in warning


def test_a_negative_prompt_counts_by_its_quoted_words(glm: GlmImagePair) -> None:
    request = edit(negative_prompt="'closed'")
    drawn = glm.check_latents(request, [picture(1)])
    assert differs(drawn, glm.stages.latents(edit(), images=[picture(1)]))
    without = replace(request, negative_prompt="blurry")
    assert torch.equal(
        glm.stages.latents(without, images=[picture(1)]), glm.stages.latents(edit(), images=[picture(1)])
    )
    (warning,) = read_state(glm.stages.encode("r", without, [picture(1)])).warnings
    assert "only words in quotation marks" in warning


def test_prompts_encoded_together_equal_those_encoded_alone(glm: GlmImagePair) -> None:
    requests = {"a": edit(prompt="'one'"), "b": edit(prompt="'one' 'two'"), "c": edit(prompt="'a longer one'")}
    for request_id, request in requests.items():
        glm.stages.admit("text_encoding", request_id, make_blob(request_id, request, [picture(1)]))
    done = glm.stages.tick("text_encoding", [(request_id, 0) for request_id in requests])
    for request_id, request in requests.items():
        alone = load(glm.stages.run("text_encoding", "alone", make_blob("alone", request, [picture(1)])))
        for name, tensor in load(done.results[request_id]).items():
            assert_close(tensor.float(), alone[name].float())


@pytest.mark.parametrize("scale", [1.0, 1.5, 6.0])
def test_guidance_equals_the_pipelines(glm: GlmImagePair, scale: float) -> None:
    guided = glm.check_latents(edit(guidance_scale=scale), [picture(1)])
    assert differs(guided, glm.stages.latents(edit(guidance_scale=3.0), images=[picture(1)]))


# Pictures to image.


@pytest.mark.parametrize(
    ("height", "width", "sizes"), [(32, 32, [(64, 32)]), (64, 96, [(32, 32), (32, 64)]), (32, 64, [(39, 33)] * 4)]
)
def test_condition_pictures_equal_the_pipelines(
    glm: GlmImagePair, height: int, width: int, sizes: list[tuple[int, int]]
) -> None:
    images = [picture(index, *size) for index, size in enumerate(sizes)]
    request = edit(len(images), height=height, width=width, num_outputs=2)
    drawn = glm.check_latents(request, images)
    others = [picture(9, *sizes[0]), *images[1:]]
    assert differs(drawn, glm.stages.latents(request, images=others))


def test_pixels_of_a_changed_picture_are_within_one_of_the_pipelines(glm: GlmImagePair) -> None:
    glm.check_pictures(edit(height=64), [picture(3, 64, 64)])


@pytest.mark.parametrize(
    ("size", "message"), [((56, 32), "56 x 32 pixels, and the prior sees it as 64 x 32"), ((32, 160), "aspect ratio")]
)
def test_a_picture_that_prior_and_transformer_see_differently_is_refused(
    glm: GlmImagePair, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        glm.stages.encode("r", edit(), [picture(1, *size)])


# Batches of rows at different steps.


def test_prompts_of_several_lengths_share_a_batch(glm: GlmImagePair) -> None:
    requests = {
        "plain": make(num_inference_steps=4, guidance_scale=1.0),
        "guided": make(num_inference_steps=2, num_outputs=2),
        "strong": make(num_inference_steps=3, guidance_scale=5.0, negative_prompt="'closed'"),
    }
    glm.check_batch(requests, {"plain": 0, "guided": 1, "strong": 2})


def test_requests_with_pictures_of_equal_sizes_share_a_batch(glm: GlmImagePair) -> None:
    requests = {
        "plain": edit(2, num_inference_steps=4, guidance_scale=1.0),
        "guided": edit(2, num_inference_steps=2, num_outputs=2, prompt="'one' and 'two'"),
        "other": edit(2, num_inference_steps=3, prompt="nothing to write"),
    }
    images = {name: [picture(index), picture(5 + index, 64, 32)] for index, name in enumerate(requests)}
    glm.check_batch(requests, {"plain": 0, "guided": 1, "other": 2}, images)


@pytest.fixture
def forward_passes(glm: GlmImagePair) -> Iterator[list[str]]:
    """What the transformer was called for since the test began: "picture" or "step"."""
    components = glm.stages.executors["denoising"]._plan.on_tick._components  # type: ignore[attr-defined]
    calls: list[str] = []

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        calls.append("step" if inputs["encoder_hidden_states"].shape[1] else "picture")

    handle = components["transformer"].register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    handle.remove()


def test_a_condition_picture_is_seen_once_by_all_outputs(glm: GlmImagePair, forward_passes: list[str]) -> None:
    glm.stages.latents(edit(2, num_inference_steps=3, num_outputs=2), images=[picture(1), picture(2)])
    assert forward_passes.count("picture") == 2
    assert forward_passes.count("step") == 3 * 2, "with pictures and without them"


def test_condition_pictures_are_remembered_when_others_come_and_go(
    glm: GlmImagePair, forward_passes: list[str]
) -> None:
    requests = {"stays": edit(num_inference_steps=4), "comes": edit(num_inference_steps=2, seed=8)}
    images = {"stays": [picture(1)], "comes": [picture(2)]}
    glm.check_batch(requests, {"stays": 0, "comes": 1}, images)
    assert forward_passes.count("picture") == 2


def test_only_pictures_of_equal_sizes_may_share_a_batch(glm: GlmImagePair) -> None:
    def key(request: GenerationRequest, images: list[Picture]) -> str:
        state = read_state(glm.stages.encode("r", request, images))
        return FAMILY.batch_key("denoising", request, state.tensor_infos)

    one = key(edit(), [picture(1)])
    assert one == key(edit(prompt="'another length'", guidance_scale=1.0), [picture(2)])
    assert len({one, key(make(), []), key(edit(), [picture(1, 64, 32)]), key(edit(2), [picture(1)] * 2)}) == 4


# Warm-up, defaults and bad checkpoints.


@pytest.mark.parametrize("stage_model", ["text_encoding", "denoising", "decoding"])
def test_the_warm_up_runs(glm: GlmImagePair, stage_model: str) -> None:
    executor = glm.stages.executors[stage_model]
    components = executor._plan.on_tick._components  # type: ignore[attr-defined]
    warm_up = WarmUp(stage_model, executor, FAMILY, components, alone())
    assert warm_up.can_run
    assert warm_up.warm_up([(32, 64)], 1)


def test_defaults_are_the_pipelines(glm: GlmImagePair) -> None:
    defaults = FAMILY.defaults(glm.stages.checkpoint)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.max_sequence_length) == (50, 1.5, 2048)
    assert (defaults.size_multiple, defaults.height, defaults.max_images) == (32, 512, 4)
    assert FAMILY.default_size(defaults, []) == (512, 512)
    assert FAMILY.default_size(defaults, [(70, 20), (64, 64)]) == (64, 32)


def test_cost_counts_pictures_and_quoted_words(glm: GlmImagePair) -> None:
    assert FAMILY.num_tokens(edit(2, prompt="say 'ü' and 'b'"), glm.stages.checkpoint) == 3 + 2 + 3 * 4


def test_a_transformer_of_another_patch_size_is_refused(glm: GlmImagePair, tmp_path: Path) -> None:
    checkpoint = _with(glm.stages.checkpoint, tmp_path, "transformer", patch_size=2)
    with pytest.raises(ConfigurationError, match="8 pixels wide, and the prior draws up 16"):
        FAMILY.defaults(checkpoint)


@pytest.mark.parametrize(
    ("never", "message"),
    [(IMAGE_START, "ended after 0 of 2 tokens"), (IMAGE_END, rf"sampled \[{IMAGE_START}\], .* below {CODEBOOK_SIZE}")],
)
def test_a_prior_that_is_no_picture_is_an_error(
    glm: GlmImagePair, monkeypatch: pytest.MonkeyPatch, never: int, message: str
) -> None:
    components = glm.stages.executors["prior_generation"]._plan.on_tick._components  # type: ignore[attr-defined]
    config = components["vision_language_encoder"].generation_config
    monkeypatch.setattr(config, "suppress_tokens", [*range(CODEBOOK_SIZE), never])
    with pytest.raises(StageError, match=message):
        glm.stages.encode("r", edit(height=64, seed=never), [picture(1)])


def _with(checkpoint: Checkpoint, folder: Path, component: str, **values: Any) -> Checkpoint:
    """A checkpoint of the same configuration but for `values`; it has no weights."""
    for file in checkpoint.path.rglob("*.json"):
        copy = folder / file.relative_to(checkpoint.path)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text())
    config = folder / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    return open_checkpoint(str(folder))
