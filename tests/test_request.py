"""What a caller may ask: defaults, limits, and messages that say what to do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_diffusion.config import ChainConfig
from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.request import (
    INPUT_NAMES,
    MAX_SEED,
    GenerationRequest,
    RequestDefaults,
    describe_parameters,
    describe_tasks,
    resolve_request,
)

DEFAULTS = RequestDefaults(
    height=1024,
    width=768,
    size_multiple=16,
    num_inference_steps=28,
    guidance_scale=1.0,
    embedded_guidance_scale=3.5,
    max_sequence_length=256,
    longest_sequence_length=512,
)
CHANGES_PICTURES = replace(DEFAULTS, max_images=1, strength=0.6)
VIDEO = replace(DEFAULTS, num_frames=81, frame_step=4, fps=16.0, flow_shift=3.0)
ANIMATES = replace(VIDEO, min_images=1, max_images=2)
UNDISTILLED = replace(DEFAULTS, embedded_guidance_scale=None)
EXPERTS = replace(UNDISTILLED, guidance_scale=5.0, has_guidance_scale_2=True)
UNGUIDED = replace(UNDISTILLED, guidance_threshold=math.inf)
LIMITS = ChainConfig(max_pixels=1024 * 1024, max_num_inference_steps=50, max_num_outputs=4, max_prompt_bytes=100)


def resolve(defaults: RequestDefaults = DEFAULTS, num_images: int = 0, **given: Any) -> GenerationRequest:
    return resolve_request({"prompt": "a cat"} | given, defaults, LIMITS, num_images=num_images)[0]


def warnings_of(defaults: RequestDefaults = DEFAULTS, **given: Any) -> list[str]:
    return resolve_request({"prompt": "a cat"} | given, defaults, LIMITS)[1]


def test_what_is_left_open_comes_from_the_checkpoint() -> None:
    request = resolve()
    assert (request.height, request.width) == (1024, 768)
    assert request.num_inference_steps == 28
    assert (request.guidance_scale, request.embedded_guidance_scale) == (1.0, 3.5)
    assert request.max_sequence_length == 256
    assert (request.negative_prompt, request.num_outputs, request.output_format) == ("", 1, "b64_png")
    assert request.preview_interval == 0


def test_what_is_given_is_kept() -> None:
    values = {
        "prompt": "a dog",
        "negative_prompt": "blurry",
        "height": 512,
        "width": 256,
        "num_inference_steps": 50,
        "guidance_scale": 2.5,
        "embedded_guidance_scale": 0.0,
        "seed": 5,
        "num_outputs": 4,
        "max_sequence_length": 512,
        "output_format": "webp",
        "output_quality": 100,
        "preview_interval": 3,
        "priority": 9,
        "deadline_s": 12.5,
        "deadline_action": "drop",
    }
    of_others = {"num_frames": 1, "fps": 0.0, "flow_shift": None, "strength": None, "guidance_scale_2": None}
    assert values.keys() | of_others.keys() == set(INPUT_NAMES)
    assert resolve(**values).to_json() == values | of_others | {"num_images": 0}


def test_a_request_survives_json() -> None:
    request = resolve(seed=MAX_SEED)
    assert GenerationRequest(**request.to_json()) == request


def test_without_priority_and_deadline_a_request_is_one_of_many() -> None:
    request = resolve()
    assert (request.priority, request.deadline_s, request.deadline_action) == (5, None, "refuse")


@pytest.mark.parametrize("priority", [-1, 10])
def test_a_priority_is_between_0_and_9(priority: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"priority={priority} must be between 0 and 9"):
        resolve(priority=priority)


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, math.nan, math.inf, 1e7])
def test_a_deadline_must_leave_time(deadline_s: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"deadline_s=.* must be above 0 and at most 1e\+06 seconds"):
        resolve(deadline_s=deadline_s)


def test_an_unknown_deadline_action_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(InvalidRequestError, match=r"'dorp' must be one of refuse, drop, continue \(did you mean drop"):
        resolve(deadline_s=1.0, deadline_action="dorp")


def test_an_action_without_a_deadline_has_a_warning() -> None:
    assert warnings_of(deadline_action="drop") == ["deadline_action has no effect without deadline_s"]


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {resolve().seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_each_output_has_a_seed_of_its_own() -> None:
    assert resolve(seed=9, num_outputs=3).output_seeds == [9, 10, 11]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"promt": "x"}, r"input 'promt' is not known \(did you mean prompt\?\)"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": "ü" * 51}, "prompt has 102 bytes; this server allows 100 .*max_prompt_bytes"),
        ({"negative_prompt": "x" * 101}, "negative_prompt has 101 bytes"),
        ({"height": 500}, "height=500 must be a positive multiple of 16 .*try 496 or 512"),
        ({"width": 15}, "width=15 .*try 16 or 32"),
        ({"width": 0}, "width=0"),
        ({"height": -16}, "height=-16"),
        ({"height": 2048}, "height=2048 x width=768 is 1572864 pixels; this server allows 1048576 .*max_pixels"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be between 1 and 50"),
        ({"num_inference_steps": 51}, "num_inference_steps=51 must be between 1 and 50"),
        ({"num_outputs": 0}, "num_outputs=0 must be between 1 and 4"),
        ({"num_outputs": 5}, "num_outputs=5 must be between 1 and 4"),
        ({"max_sequence_length": 0}, "max_sequence_length=0 must be between 1 and 512"),
        ({"max_sequence_length": 513}, "max_sequence_length=513 must be between 1 and 512"),
        ({"guidance_scale": -0.1}, "guidance_scale=-0.1 must be a finite number between 0 and 1000"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan"),
        ({"embedded_guidance_scale": math.inf}, "embedded_guidance_scale=inf"),
        ({"seed": -1}, f"seed=-1 must be between 0 and {MAX_SEED}"),
        ({"seed": MAX_SEED, "num_outputs": 2}, f"seed={MAX_SEED} must be between 0 and {MAX_SEED - 1}"),
        ({"output_format": "jpg"}, r"output_format='jpg' must be one of .*did you mean jpeg\?"),
        ({"output_quality": 0}, "output_quality=0 must be between 1 and 100"),
        ({"output_quality": 101}, "output_quality=101"),
        ({"preview_interval": -1}, "preview_interval=-1"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        resolve(**given)


def test_a_missing_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        resolve_request({}, DEFAULTS, LIMITS)


@given(value=st.integers(-(2**31), 2**31 - 1), name=st.sampled_from(["height", "width"]))
def test_a_size_is_taken_as_it_is_or_refused_never_rounded(value: int, name: str) -> None:
    try:
        request = resolve(**{"height": 16, "width": 16} | {name: value})
    except InvalidRequestError:
        assert value <= 0 or value % 16 or value * 16 > LIMITS.max_pixels
    else:
        assert getattr(request, name) == value


def test_the_sizes_that_a_refusal_proposes_are_allowed() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolve(height=500)
    for word in str(caught.value).split("try ")[1].split(" or "):
        assert resolve(height=int(word)).height == int(word)


def test_embedded_guidance_without_effect_is_warned_of() -> None:
    (warning,) = warnings_of(UNDISTILLED, embedded_guidance_scale=2.0)
    assert "embedded_guidance_scale has no effect" in warning
    assert warnings_of(DEFAULTS, embedded_guidance_scale=2.0) == []


def test_a_negative_prompt_without_effect_is_warned_of() -> None:
    (warning,) = warnings_of(UNDISTILLED, negative_prompt="dark")
    assert "negative_prompt has no effect at guidance_scale=1.0" in warning
    assert warnings_of(UNDISTILLED, negative_prompt="dark", guidance_scale=2.0) == []


def test_what_has_an_effect_depends_on_where_the_guidance_of_the_checkpoint_starts() -> None:
    starts_at_0 = replace(UNDISTILLED, guidance_threshold=0.0)
    assert warnings_of(starts_at_0, negative_prompt="dark", guidance_scale=0.1) == []
    (warning,) = warnings_of(starts_at_0, negative_prompt="dark", guidance_scale=0.0)
    assert "set it above 0" in warning
    guidance, negative = warnings_of(UNGUIDED, negative_prompt="dark", guidance_scale=4.0)
    assert "guidance_scale has no effect: this checkpoint is distilled" in guidance
    assert "negative_prompt has no effect" in negative
    assert warnings_of(UNGUIDED) == warnings_of(UNGUIDED, guidance_scale=1.0) == []


def test_low_noise_has_a_guidance_scale_of_its_own_where_a_transformer_of_its_own_makes_it() -> None:
    assert resolve(EXPERTS).guidance_scale_2 is None, "as guidance_scale"
    assert resolve(EXPERTS, guidance_scale_2=3.0).guidance_scale_2 == 3.0
    (warning,) = warnings_of(EXPERTS, guidance_scale=1.0, guidance_scale_2=3.0)
    assert "guidance_scale_2 has no effect at guidance_scale=1.0" in warning
    assert warnings_of(EXPERTS, guidance_scale_2=3.0) == []


def test_doubled_work_on_a_distilled_checkpoint_is_warned_of() -> None:
    (warning,) = warnings_of(DEFAULTS, guidance_scale=2.0)
    assert "embedded_guidance_scale" in warning
    assert warnings_of(UNDISTILLED, guidance_scale=2.0) == []


# Videos and pictures that a request brings.


def test_a_video_has_the_checkpoints_frames_and_a_format_of_videos() -> None:
    request = resolve(VIDEO)
    assert (request.num_frames, request.fps, request.flow_shift) == (81, 16.0, 3.0)
    assert request.output_format == "b64_mp4"
    given = resolve(VIDEO, num_frames=9, fps=23.976, flow_shift=5.5, output_format="webm")
    assert (given.num_frames, given.fps, given.flow_shift, given.output_format) == (9, 23.976, 5.5, "webm")


def test_a_single_frame_of_a_video_model_is_a_picture() -> None:
    assert resolve(VIDEO, num_frames=1).output_format == "b64_png"
    with pytest.raises(InvalidRequestError, match="output_format='mp4' must be one of b64_png"):
        resolve(VIDEO, num_frames=1, output_format="mp4")
    with pytest.raises(InvalidRequestError, match="output_format='png' must be one of b64_mp4"):
        resolve(VIDEO, output_format="png")


@pytest.mark.parametrize(
    ("defaults", "given", "message"),
    [
        (DEFAULTS, {"num_frames": 5}, "num_frames=5: this model draws pictures, so it must be 1"),
        (VIDEO, {"num_frames": 7}, "num_frames=7 must be 1 more than a multiple of 4 for this model; try 5 or 9"),
        (VIDEO, {"num_frames": 0}, "num_frames=0 must be 1 more than a multiple of 4"),
        (VIDEO, {"num_frames": 4001}, "num_frames=4001 must be at most 1025"),
        (DEFAULTS, {"fps": 8.0}, "fps=8.0: this model draws pictures"),
        (VIDEO, {"fps": 0.0}, "fps=0.0 must be above 0 and at most 240"),
        (VIDEO, {"fps": math.nan}, "fps=nan must be above 0"),
        (DEFAULTS, {"flow_shift": 3.0}, "flow_shift=3.0: the schedule of this model has no shift to set"),
        (VIDEO, {"flow_shift": 0.0}, "flow_shift=0.0 must be above 0 and at most 100"),
        (DEFAULTS, {"guidance_scale_2": 3.0}, "guidance_scale_2=3.0: this model has no second transformer"),
        (EXPERTS, {"guidance_scale_2": -1.0}, "guidance_scale_2=-1.0 must be a finite number between 0 and 1000"),
        (DEFAULTS, {"strength": 0.5}, "strength=0.5: this model does not start from a picture"),
        (CHANGES_PICTURES, {"strength": 0.5}, "send it as image, too"),
        (CHANGES_PICTURES, {"strength": 0.0, "num_images": 1}, "strength=0.0 must be above 0"),
        (DEFAULTS, {"num_images": 1}, "image: 1 given, and this server takes none for this model"),
        (CHANGES_PICTURES, {"num_images": 2}, "image: 2 given, and this model takes 0 to 1"),
        (ANIMATES, {}, "image: 0 given, and this model takes 1 to 2"),
    ],
)
def test_what_a_model_does_not_do_is_refused(defaults: RequestDefaults, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        resolve(defaults, **given)


def test_a_picture_is_changed_with_the_checkpoints_strength_and_without_one_there_is_none() -> None:
    assert resolve(CHANGES_PICTURES, num_images=1).strength == 0.6
    assert resolve(CHANGES_PICTURES, num_images=1, strength=1.0).strength == 1.0
    assert resolve(CHANGES_PICTURES).strength is None
    assert resolve(ANIMATES, num_images=2).num_images == 2


def test_fps_of_a_picture_and_quality_of_a_gif_have_no_effect_and_say_so() -> None:
    assert any("fps" in warning for warning in warnings_of(VIDEO, num_frames=1, fps=8.0))
    assert any("gif" in warning for warning in warnings_of(VIDEO, output_format="gif", output_quality=50))
    assert warnings_of(VIDEO, fps=8.0) == []


# What a checkpoint takes, in words.


@pytest.mark.parametrize(
    ("defaults", "tasks"),
    [
        (DEFAULTS, ["text-to-image"]),
        (CHANGES_PICTURES, ["text-to-image", "image-to-image"]),
        (VIDEO, ["text-to-video"]),
        (ANIMATES, ["image-to-video"]),
    ],
)
def test_tasks_follow_from_what_goes_in_and_comes_out(defaults: RequestDefaults, tasks: list[str]) -> None:
    assert describe_tasks(defaults) == tasks


@pytest.mark.parametrize("defaults", [DEFAULTS, EXPERTS, UNGUIDED, CHANGES_PICTURES, VIDEO, ANIMATES])
def test_every_parameter_that_is_described_is_taken_at_its_bounds(defaults: RequestDefaults) -> None:
    """And those that are not described are refused, or have no effect."""
    described = describe_parameters(defaults, LIMITS)
    assert set(described) <= {*INPUT_NAMES, "image"}
    images = {"num_images": defaults.min_images or defaults.max_images}
    for name, parameter in described.items():
        values = [parameter[bound] for bound in ("min", "max") if bound in parameter] + parameter.get("choices", [])
        for value in values:
            if name in ("height", "width", "deadline_s", "num_frames", "fps", "flow_shift", "strength") and (
                value == parameter.get("min") == 0 or name == "num_frames"
            ):
                continue
            frames = {"num_frames": 1 + defaults.frame_step} if name == "output_format" and defaults.frame_step else {}
            others = {"height": 16, "width": 16} if name in ("height", "width") else {}
            resolve(defaults, **images | frames | others | {name: value})


@pytest.mark.parametrize(
    ("height", "width", "num_frames", "num_inference_steps", "num_outputs"),
    [
        (1024, 1024, 1, 50, 8),
        (2048, 2048, 1, 50, 8),
        (704, 1280, 121, 50, 2),
        (720, 1280, 129, 50, 3),
    ],
    ids=["FLUX, Qwen-Image, GLM-Image", "the largest picture", "Wan 2.2", "HunyuanVideo"],
)
def test_what_the_pipelines_draw_by_default_is_far_below_the_default_limits(
    height: int, width: int, num_frames: int, num_inference_steps: int, num_outputs: int
) -> None:
    given = {
        "prompt": "a cat",
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "num_outputs": num_outputs,
    }
    resolve_request(given, VIDEO if num_frames > 1 else DEFAULTS, ChainConfig())


def test_values_that_are_allowed_each_may_cost_too_much_together() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"num_frames=1025 x num_outputs=4 .*allows 50000000000 .*max_pixel_s"
    ):
        resolve(VIDEO, num_frames=1025, num_outputs=4, num_inference_steps=50)
