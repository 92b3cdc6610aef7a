"""What a caller may ask: the request, its tensors on the wire, and the rules it is checked against."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from triton_diffusion.config import HIGHEST, RequestLimits
from triton_diffusion.errors import InvalidRequestError, nearest_name_hint
from triton_diffusion.scheduler import DEFAULT_PRIORITY, HIGHEST_PRIORITY, LOWEST_PRIORITY, DeadlineAction

DEADLINE_ACTIONS: tuple[DeadlineAction, ...] = get_args(DeadlineAction)
LONGEST_DEADLINE_S = 1e6
PICTURE_FORMATS = ("b64_png", "b64_jpeg", "b64_webp", "png", "jpeg", "webp", "raw")
VIDEO_FORMATS = ("b64_mp4", "b64_webm", "b64_gif", "mp4", "webm", "gif", "raw")
MAX_SEED = 2**63 - 1
HIGHEST_FPS = 240
HIGHEST_FLOW_SHIFT = 100.0

_Choice = TypeVar("_Choice", bound=str)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A request with every value decided; what is left open by the caller has been filled in.

    Names are those of the diffusers pipelines, but for guidance: `guidance_scale` always means classifier-free guidance
    (two predictions, mixed) and `embedded_guidance_scale` the number a guidance-distilled model is fed.
    """

    prompt: str
    negative_prompt: str
    """Used where there is classifier-free guidance; empty is the unconditional prompt."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_inference_steps: int
    guidance_scale: float
    """Classifier-free guidance where it is above RequestDefaults.guidance_threshold."""
    embedded_guidance_scale: float
    """Without effect on a checkpoint that is not guidance-distilled."""
    seed: int
    """Of the first output; output i is drawn from seed + i."""
    num_outputs: int
    max_sequence_length: int
    """Tokens that the prompt is padded or cut to."""
    output_format: str
    output_quality: int
    """1 to 100, of lossy formats: jpeg, webp, mp4, webm."""
    num_frames: int = 1
    """Pictures of one output; above 1 it is a video."""
    fps: float = 0.0
    """Frames a second of a video; without effect on pictures."""
    flow_shift: float | None = None
    """Shift of a flow-matching schedule: higher stays longer at high noise; None takes the checkpoint's."""
    strength: float | None = None
    """How far a given picture is changed, above 0 (hardly) to 1 (all new); None where no picture is changed."""
    num_images: int = 0
    """Pictures that the caller gave."""
    guidance_scale_2: float | None = None
    """That of the steps of low noise, where a second transformer makes those; None takes guidance_scale."""
    preview_interval: int = 0
    """Steps between two previews; 0 for none."""
    priority: int = DEFAULT_PRIORITY
    """9 goes before 8, and so on down to 0."""
    deadline_s: float | None = None
    """Seconds after the arrival by which the result is wanted."""
    deadline_action: DeadlineAction = "refuse"
    """What becomes of the request when that cannot be; see scheduler.Work."""

    def __post_init__(self) -> None:
        """Refuse what no checkpoint can draw; the limits of checkpoint and deployment are those of `resolve_request`.

        Any client may call a stage model, past the chain and its limits.

        Raises:
            ValueError: a count is out of bounds or a scale is not finite.
        """
        for name, highest in HIGHEST.items():
            if not 1 <= getattr(self, name) <= highest:
                raise ValueError(f"{name}={getattr(self, name)} must be between 1 and {highest}")
        if self.preview_interval < 0 or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"preview_interval={self.preview_interval} or seed={self.seed} is out of bounds")
        scales = (self.guidance_scale, self.embedded_guidance_scale, self.guidance_scale_2 or 0.0)
        if not all(map(math.isfinite, scales)):
            raise ValueError("a guidance scale is not finite")
        if self.flow_shift is not None and not 0 < self.flow_shift <= HIGHEST_FLOW_SHIFT:
            raise ValueError(f"flow_shift={self.flow_shift} must be above 0 and at most {HIGHEST_FLOW_SHIFT}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} must be above 0 and at most 1")
        if not (math.isfinite(self.fps) and 0 <= self.fps <= HIGHEST_FPS) or self.num_images < 0:
            raise ValueError(f"fps={self.fps} or num_images={self.num_images} is out of bounds")
        if not LOWEST_PRIORITY <= self.priority <= HIGHEST_PRIORITY:
            raise ValueError(f"priority={self.priority} must be between {LOWEST_PRIORITY} and {HIGHEST_PRIORITY}")

    @property
    def output_seeds(self) -> list[int]:
        """The seed of each output, with which it can be drawn again alone."""
        return [self.seed + index for index in range(self.num_outputs)]

    def to_json(self) -> dict[str, Any]:
        """Plain values under the field names."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class RequestDefaults:
    """What a checkpoint takes when the caller leaves a value open, and what it cannot do otherwise."""

    height: int
    width: int
    size_multiple: int
    """Height and width must be multiples of this many pixels."""
    num_inference_steps: int
    guidance_scale: float
    embedded_guidance_scale: float | None
    """None where the checkpoint is not guidance-distilled."""
    max_sequence_length: int
    longest_sequence_length: int
    """Tokens that the text encoder takes at most."""
    num_frames: int = 1
    frame_step: int = 0
    """num_frames must be 1 more than a multiple of this; 0 where the checkpoint makes pictures, not videos."""
    fps: float = 0.0
    flow_shift: float | None = None
    """None where the schedule has no shift that a request could set."""
    strength: float | None = None
    """None where a picture cannot be changed (img2img)."""
    min_images: int = 0
    """Pictures that a request must bring."""
    max_images: int = 0
    """Pictures that a request may bring."""
    guidance_threshold: float = 1.0
    """That of ModelFamily.guidance_threshold."""
    has_guidance_scale_2: bool = False
    """Whether the steps of low noise can have a guidance_scale of their own."""


def example_request(defaults: RequestDefaults, **values: Any) -> GenerationRequest:
    """A request that leaves all to the checkpoint but for `values`: for warm-up and estimates."""
    left_open: dict[str, Any] = {
        "prompt": "warm-up",
        "negative_prompt": "",
        "height": defaults.height,
        "width": defaults.width,
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "embedded_guidance_scale": defaults.embedded_guidance_scale or 0.0,
        "seed": 0,
        "num_outputs": 1,
        "max_sequence_length": defaults.max_sequence_length,
        "output_format": (VIDEO_FORMATS if defaults.num_frames > 1 else PICTURE_FORMATS)[0],
        "output_quality": 90,
        "num_frames": defaults.num_frames,
        "fps": defaults.fps,
        "flow_shift": defaults.flow_shift,
        "num_images": defaults.min_images,
    }
    return GenerationRequest(**left_open | values)


INPUT_NAMES = tuple(field.name for field in dataclasses.fields(GenerationRequest) if field.name != "num_images")
"""The input tensors of the chain that have shape [1]; beside them it takes `image`, of shape [n]."""


def resolve_request(
    given: Mapping[str, Any], defaults: RequestDefaults, limits: RequestLimits, *, num_images: int = 0
) -> tuple[GenerationRequest, list[str]]:
    """Check what the caller gave and decide what was left open.

    Args:
        given: Python values by input name; a name that is missing was not sent.
        defaults: of the checkpoint that is served.
        limits: of this deployment.
        num_images: pictures that the caller gave.

    Returns:
        The request and the warnings that go into its `timings`.

    Raises:
        InvalidRequestError: a value is not allowed; the message names it, what is allowed and what to do.
    """
    for name in given:
        if name not in INPUT_NAMES:
            raise InvalidRequestError(f"input {name!r} is not known{nearest_name_hint(name, INPUT_NAMES)}")
    height = given.get("height", defaults.height)
    width = given.get("width", defaults.width)
    _check_size(height, width, defaults, limits)
    num_outputs = _checked_int(given, "num_outputs", 1, 1, limits.max_num_outputs)
    check_num_images(num_images, defaults)
    num_frames = _checked_num_frames(given, defaults, limits)
    request = GenerationRequest(
        prompt=_checked_prompt(given, "prompt", limits),
        negative_prompt=_checked_prompt(given, "negative_prompt", limits),
        height=height,
        width=width,
        num_inference_steps=_checked_int(
            given, "num_inference_steps", defaults.num_inference_steps, 1, limits.max_num_inference_steps
        ),
        guidance_scale=_checked_scale(given, "guidance_scale", defaults.guidance_scale),
        embedded_guidance_scale=_checked_scale(
            given, "embedded_guidance_scale", defaults.embedded_guidance_scale or 0.0
        ),
        guidance_scale_2=_checked_guidance_scale_2(given, defaults),
        seed=_checked_seed(given, num_outputs),
        num_outputs=num_outputs,
        max_sequence_length=_checked_int(
            given, "max_sequence_length", defaults.max_sequence_length, 1, defaults.longest_sequence_length
        ),
        num_frames=num_frames,
        fps=_checked_fps(given, defaults),
        flow_shift=_checked_flow_shift(given, defaults),
        strength=_checked_strength(given, defaults, num_images),
        num_images=num_images,
        output_format=_checked_choice(given, "output_format", VIDEO_FORMATS if num_frames > 1 else PICTURE_FORMATS),
        output_quality=_checked_int(given, "output_quality", 90, 1, 100),
        preview_interval=_checked_int(given, "preview_interval", 0, 0, limits.max_num_inference_steps),
        priority=_checked_int(given, "priority", DEFAULT_PRIORITY, LOWEST_PRIORITY, HIGHEST_PRIORITY),
        deadline_s=_checked_deadline(given),
        deadline_action=_checked_choice(given, "deadline_action", DEADLINE_ACTIONS),
    )
    _check_cost(request, limits)
    return request, _warnings(given, request, defaults)


def check_num_images(num_images: int, defaults: RequestDefaults) -> None:
    """Raise InvalidRequestError unless a request may bring so many pictures."""
    lowest, highest = defaults.min_images, defaults.max_images
    if lowest <= num_images <= highest:
        return
    if not highest:
        raise InvalidRequestError(
            f"image: {num_images} given, and this server takes none for this model; leave out image, it draws from the "
            "prompt alone"
        )
    allowed = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
    raise InvalidRequestError(f"image: {num_images} given, and this model takes {allowed}")


def _checked_num_frames(given: Mapping[str, Any], defaults: RequestDefaults, limits: RequestLimits) -> int:
    value: int = given.get("num_frames", defaults.num_frames)
    step = defaults.frame_step
    if not step:
        if value != 1:
            raise InvalidRequestError(f"num_frames={value}: this model draws pictures, so it must be 1; leave it out")
        return value
    if value < 1 or (value - 1) % step:
        lower = 1 + max(0, value - 1) // step * step
        raise InvalidRequestError(
            f"num_frames={value} must be 1 more than a multiple of {step} for this model; try {lower} or {lower + step}"
        )
    if value > limits.max_num_frames:
        raise InvalidRequestError(
            f"num_frames={value} must be at most {limits.max_num_frames} (parameter max_num_frames); "
            "ask for a shorter video"
        )
    return value


def _checked_fps(given: Mapping[str, Any], defaults: RequestDefaults) -> float:
    value: float = given.get("fps", defaults.fps)
    if not defaults.frame_step:
        if "fps" in given:
            raise InvalidRequestError(f"fps={value}: this model draws pictures, which have no fps; leave it out")
        return 0.0
    if not (math.isfinite(value) and 0 < value <= HIGHEST_FPS):
        raise InvalidRequestError(f"fps={value} must be above 0 and at most {HIGHEST_FPS} frames a second")
    return value


def _checked_flow_shift(given: Mapping[str, Any], defaults: RequestDefaults) -> float | None:
    value: float | None = given.get("flow_shift", defaults.flow_shift)
    if value is None:
        return None
    if defaults.flow_shift is None:
        raise InvalidRequestError(f"flow_shift={value}: the schedule of this model has no shift to set; leave it out")
    if not (math.isfinite(value) and 0 < value <= HIGHEST_FLOW_SHIFT):
        raise InvalidRequestError(f"flow_shift={value} must be above 0 and at most {HIGHEST_FLOW_SHIFT:g}")
    return value


def _checked_strength(given: Mapping[str, Any], defaults: RequestDefaults, num_images: int) -> float | None:
    if "strength" not in given:
        return defaults.strength if num_images else None
    value: float = given["strength"]
    if defaults.strength is None:
        raise InvalidRequestError(
            f"strength={value}: this model does not start from a picture, so it has no strength; leave it out"
        )
    if not num_images:
        raise InvalidRequestError(f"strength={value} says how far a picture is changed; send it as image, too")
    if not (math.isfinite(value) and 0 < value <= 1):
        raise InvalidRequestError(f"strength={value} must be above 0 (hardly changed) and at most 1 (all new)")
    return value


def _check_size(height: int, width: int, defaults: RequestDefaults, limits: RequestLimits) -> None:
    multiple = defaults.size_multiple
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            lower = max(multiple, value // multiple * multiple)
            raise InvalidRequestError(
                f"{name}={value} must be a positive multiple of {multiple} for this model; "
                f"try {lower} or {lower + multiple}"
            )
        if value > HIGHEST[name]:
            raise InvalidRequestError(f"{name}={value} must be at most {HIGHEST[name]}; ask for a smaller picture")
    if height * width > limits.max_pixels:
        raise InvalidRequestError(
            f"height={height} x width={width} is {height * width} pixels; this server allows {limits.max_pixels} "
            "(parameter max_pixels); ask for a smaller picture"
        )


def _check_cost(request: GenerationRequest, limits: RequestLimits) -> None:
    """Each value may be allowed and all of them together still keep the server for days."""
    pixels = request.height * request.width * request.num_frames * request.num_outputs
    if (cost := pixels * request.num_inference_steps) > limits.max_pixel_steps:
        raise InvalidRequestError(
            f"height={request.height} x width={request.width} x num_frames={request.num_frames} x "
            f"num_outputs={request.num_outputs} x num_inference_steps={request.num_inference_steps} is {cost}; this "
            f"server allows {limits.max_pixel_steps} (parameter max_pixel_steps); ask for less of one of them"
        )


def _checked_prompt(given: Mapping[str, Any], name: str, limits: RequestLimits) -> str:
    if name == "prompt" and not given.get("prompt", "").strip():
        raise InvalidRequestError("prompt is empty; say in words what to draw")
    prompt = str(given.get(name, ""))
    size_bytes = len(prompt.encode())
    if size_bytes > limits.max_prompt_bytes:
        raise InvalidRequestError(
            f"{name} has {size_bytes} bytes; this server allows {limits.max_prompt_bytes} "
            "(parameter max_prompt_bytes); shorten it"
        )
    return prompt


def _checked_int(given: Mapping[str, Any], name: str, default: int, lowest: int, highest: int) -> int:
    value: int = given.get(name, default)
    if not lowest <= value <= highest:
        raise InvalidRequestError(f"{name}={value} must be between {lowest} and {highest}")
    return value


def _checked_scale(given: Mapping[str, Any], name: str, default: float) -> float:
    value: float = given.get(name, default)
    if not (math.isfinite(value) and 0 <= value <= 1000):
        raise InvalidRequestError(f"{name}={value} must be a finite number between 0 and 1000")
    return value


def _checked_guidance_scale_2(given: Mapping[str, Any], defaults: RequestDefaults) -> float | None:
    if "guidance_scale_2" not in given:
        return None
    value = _checked_scale(given, "guidance_scale_2", 0.0)
    if not defaults.has_guidance_scale_2:
        raise InvalidRequestError(
            f"guidance_scale_2={value}: this model has no second transformer for low noise; leave it out"
        )
    return value


def _checked_seed(given: Mapping[str, Any], num_outputs: int) -> int:
    seed: int = given.get("seed", secrets.randbelow(2**32))
    highest = MAX_SEED - (num_outputs - 1)
    if not 0 <= seed <= highest:
        raise InvalidRequestError(f"seed={seed} must be between 0 and {highest}; leave it out for a random one")
    return seed


def _checked_deadline(given: Mapping[str, Any]) -> float | None:
    value: float | None = given.get("deadline_s")
    if value is not None and not 0 < value <= LONGEST_DEADLINE_S:
        raise InvalidRequestError(
            f"deadline_s={value} must be above 0 and at most {LONGEST_DEADLINE_S:g} seconds; leave it out for none"
        )
    return value


def _checked_choice(given: Mapping[str, Any], name: str, choices: tuple[_Choice, ...]) -> _Choice:
    """One of some words; the first is the default."""
    value = given.get(name, choices[0])
    for choice in choices:
        if choice == value:
            return choice
    hint = nearest_name_hint(str(value), choices)
    raise InvalidRequestError(f"{name}={value!r} must be one of {', '.join(choices)}{hint}")


def _warnings(given: Mapping[str, Any], request: GenerationRequest, defaults: RequestDefaults) -> list[str]:
    warnings = []
    threshold = defaults.guidance_threshold
    uses_guidance = request.guidance_scale > threshold
    if math.isinf(threshold):
        if request.guidance_scale > 1:
            warnings.append("guidance_scale has no effect: this checkpoint is distilled to draw without")
        if "negative_prompt" in given:
            warnings.append("negative_prompt has no effect: this checkpoint draws without guidance")
    elif not uses_guidance:
        warnings += [
            f"{name} has no effect at guidance_scale={request.guidance_scale}; set it above {threshold:g}"
            for name in ("negative_prompt", "guidance_scale_2")
            if name in given
        ]
    if "embedded_guidance_scale" in given and defaults.embedded_guidance_scale is None:
        warnings.append("embedded_guidance_scale has no effect: this checkpoint is not guidance-distilled")
    if "deadline_action" in given and request.deadline_s is None:
        warnings.append("deadline_action has no effect without deadline_s")
    if "output_quality" in given and request.output_format.endswith("gif"):
        warnings.append("output_quality has no effect on gif; mp4 and webm have it")
    if "fps" in given and request.num_frames == 1:
        warnings.append("fps has no effect on a single picture; set num_frames above 1")
    if uses_guidance and defaults.embedded_guidance_scale is not None:
        warnings.append(
            "guidance_scale mixes two predictions and doubles the work; "
            "the distilled guidance of this checkpoint is embedded_guidance_scale"
        )
    return warnings


def describe_parameters(defaults: RequestDefaults, limits: RequestLimits) -> dict[str, dict[str, Any]]:
    """What a request to this checkpoint can have: by input name its default and bounds, for people and programs."""

    def number(default: Any, lowest: Any, highest: Any, text: str, **others: Any) -> dict[str, Any]:
        return {"default": default, "min": lowest, "max": highest, "description": text} | others

    multiple = defaults.size_multiple
    largest = min(HIGHEST["height"], limits.max_pixels // multiple)
    size = {"multiple_of": multiple}
    formats = VIDEO_FORMATS if defaults.num_frames > 1 else PICTURE_FORMATS
    parameters: dict[str, dict[str, Any]] = {
        "prompt": {"default": None, "description": "what to draw"},
        "height": number(defaults.height, multiple, largest, "pixels", **size),
        "width": number(defaults.width, multiple, largest, "pixels", **size),
        "num_inference_steps": number(
            defaults.num_inference_steps, 1, limits.max_num_inference_steps, "denoising steps"
        ),
        "seed": number(None, 0, MAX_SEED, "of the first output; left out, a random one"),
        "num_outputs": number(1, 1, limits.max_num_outputs, "pictures or videos"),
        "max_sequence_length": number(
            defaults.max_sequence_length, 1, defaults.longest_sequence_length, "tokens of the prompt"
        ),
        "output_format": {"default": formats[0], "choices": list(formats), "description": "how it is encoded"},
        "output_quality": number(90, 1, 100, "of lossy formats"),
        "priority": number(DEFAULT_PRIORITY, LOWEST_PRIORITY, HIGHEST_PRIORITY, "9 goes first"),
        "deadline_s": number(None, 0, LONGEST_DEADLINE_S, "seconds by which it is wanted"),
        "deadline_action": {
            "default": DEADLINE_ACTIONS[0],
            "choices": list(DEADLINE_ACTIONS),
            "description": "what becomes of a request whose deadline cannot be met",
        },
    }
    if math.isfinite(threshold := defaults.guidance_threshold):
        parameters["negative_prompt"] = {
            "default": "",
            "description": f"what to keep away from, where guidance_scale is above {threshold:g}",
        }
        parameters["guidance_scale"] = number(
            defaults.guidance_scale, 0, 1000, f"classifier-free guidance; up to {threshold:g} there is none"
        )
    if defaults.has_guidance_scale_2:
        parameters["guidance_scale_2"] = number(
            None, 0, 1000, "that of the steps of low noise; left out, it is guidance_scale"
        )
    if defaults.embedded_guidance_scale is not None:
        parameters["embedded_guidance_scale"] = number(
            defaults.embedded_guidance_scale, 0, 1000, "guidance of the distilled model"
        )
    if defaults.frame_step:
        parameters["num_frames"] = number(
            defaults.num_frames,
            1,
            limits.max_num_frames,
            "frames of a video; 1 makes a picture",
            one_more_than_multiple_of=defaults.frame_step,
        )
        parameters["fps"] = number(defaults.fps, 0, HIGHEST_FPS, "frames a second")
    if defaults.flow_shift is not None:
        parameters["flow_shift"] = number(
            defaults.flow_shift, 0, HIGHEST_FLOW_SHIFT, "higher: more steps at high noise"
        )
    if defaults.max_images:
        parameters["image"] = {
            "default": None,
            "min_count": defaults.min_images,
            "max_count": defaults.max_images,
            "max_bytes": limits.max_image_bytes,
            "description": "pictures to start from or to go by: PNG, JPEG or WebP",
        }
    if defaults.strength is not None and defaults.max_images:
        parameters["strength"] = number(defaults.strength, 0, 1, "how far the given picture is changed")
    return parameters


TASKS = ("text-to-image", "image-to-image", "text-to-video", "image-to-video")


def describe_tasks(defaults: RequestDefaults) -> list[str]:
    """What a checkpoint can do, of TASKS."""
    output = "video" if defaults.frame_step else "image"
    tasks = [] if defaults.min_images else [f"text-to-{output}"]
    return tasks + ([f"image-to-{output}"] if defaults.max_images else [])
