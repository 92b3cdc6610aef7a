"""What goes to the server, whatever carries it: arguments become tensors. What comes back is read in `_answers`.

The chain (`diffusion`) answers once; its stream (`diffusion_stream`) sends progress first; `cancellation` cancels what
either has in work; `families` tells what they take. An argument that is not set is not sent: the server knows the
defaults of its checkpoint. But the seed always is.
"""

from __future__ import annotations

import difflib
import math
import operator
import secrets
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from triton_diffusion_client._input_images import InputImage, encode_images

TransportName = Literal["grpc", "http"]
OutputFormat = Literal["png", "jpeg", "webp", "mp4", "webm", "gif", "raw"]
DeadlineAction = Literal["refuse", "drop", "continue"]


class GenerationOptions(TypedDict, total=False):
    """The options of a request, named as in diffusers' pipelines. None is the same as not given: the server decides."""

    negative_prompt: str | None
    image: InputImage | Sequence[InputImage] | None
    """What a model that takes pictures starts from: one, or a list where it takes several."""
    strength: float | None
    """How far `image` is changed: above 0 (hardly) to 1 (all new)."""
    height: int | None
    width: int | None
    num_frames: int | None
    """Pictures of a video."""
    fps: float | None
    """Frames a second of a video."""
    num_inference_steps: int | None
    guidance_scale: float | None
    """Classifier-free guidance: mixes the predictions with and without the prompt."""
    guidance_scale_2: float | None
    """That of the steps of low noise, where a second transformer makes those (Wan 2.2)."""
    embedded_guidance_scale: float | None
    """For a guidance-distilled model (FLUX.1-dev): a number the model takes in."""
    flow_shift: float | None
    """Shift of a flow-matching schedule: a higher one stays longer at high noise."""
    seed: int | None
    """Of the first output. Without one the client draws it, and the result tells it."""
    num_images_per_prompt: int | None
    """Pictures, or videos where the model makes those."""
    max_sequence_length: int | None
    """Tokens of the prompt that the text encoder sees."""
    output_format: OutputFormat | None
    """Of pictures "png", "jpeg" or "webp", of videos "mp4", "webm" or "gif"; "raw" sends the pixels of either. Without
    one the server takes png or mp4, and sends it as base64 text, which is a third longer on the way."""
    output_quality: int | None
    """1 to 100, for jpeg and webp."""
    timeout_s: float | None
    """Longest wait for the request, all attempts together, in place of the client's own `timeout_s`; math.inf: none."""
    request_id: str | None
    """The id under which the server's log names the request and `cancel` finds it; without one the client makes it."""
    priority: int | None
    """0 to 9: requests of 9 go first, those of 0 last; the server's default is 5."""
    deadline_s: float | None
    """Seconds after it is first sent within which the result is wanted."""
    deadline_action: DeadlineAction | None
    """What becomes of a request that cannot meet `deadline_s`, by the server's estimate: "refuse" (the server's
    default) refuses it at once, and drops it later if it cannot be met any more; "drop" tries, and drops it once it
    cannot be met any more; "continue" finishes it late: the deadline only orders the queue."""


class StreamOptions(GenerationOptions, total=False):
    """The options of a stream: those of a request, and when to send previews."""

    preview_interval: int | None
    """A preview every so many steps; 0: none."""


# Option -> tensor of shape [1] and its Triton data type. The other options are no such tensors.
_TENSORS = {
    "negative_prompt": ("negative_prompt", "BYTES"),
    "height": ("height", "INT32"),
    "width": ("width", "INT32"),
    "num_frames": ("num_frames", "INT32"),
    "fps": ("fps", "FP32"),
    "num_inference_steps": ("num_inference_steps", "INT32"),
    "guidance_scale": ("guidance_scale", "FP32"),
    "guidance_scale_2": ("guidance_scale_2", "FP32"),
    "embedded_guidance_scale": ("embedded_guidance_scale", "FP32"),
    "flow_shift": ("flow_shift", "FP32"),
    "strength": ("strength", "FP32"),
    "seed": ("seed", "INT64"),
    "num_images_per_prompt": ("num_outputs", "INT32"),
    "max_sequence_length": ("max_sequence_length", "INT32"),
    "output_format": ("output_format", "BYTES"),
    "output_quality": ("output_quality", "INT32"),
    "preview_interval": ("preview_interval", "INT32"),
    "priority": ("priority", "INT32"),
    "deadline_s": ("deadline_s", "FP32"),
    "deadline_action": ("deadline_action", "BYTES"),
}
_DATATYPES = {**dict(_TENSORS.values()), "prompt": "BYTES", "request_id": "BYTES", "name": "BYTES"}
_NUM_RANDOM_SEEDS = 2**32
_INTEGER_BITS = {"INT32": 32, "INT64": 64}
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class WireRequest:
    """A request as every transport sends it, to whichever model."""

    model: str
    request_id: str
    cancel_scope: str = field(repr=False)
    """Whoever names it can cancel the request; empty: not sent, the scope of all who name none."""
    timeout_s: float | None
    """None: wait as long as it takes."""
    values: Mapping[str, str | int | float]
    """By tensor name; each tensor has the shape [1]."""
    images: tuple[bytes, ...] = field(default=(), repr=False)
    """Encoded pictures, for the tensor `image` of as many elements; none: not sent."""

    def tensors(self) -> Iterator[tuple[str, str, NDArray[Any]]]:
        """Name, Triton data type and content of each input tensor."""
        for name, value in self.values.items():
            yield name, _DATATYPES[name], _to_array(value, _DATATYPES[name])
        if self.images:
            yield "image", "BYTES", np.array(self.images, dtype=np.object_)

    @property
    def parameters(self) -> Mapping[str, str]:
        """Triton's request parameters, but for the time-out, which each transport sends in its own way."""
        return {"cancel_scope": self.cancel_scope} if self.cancel_scope else {}

    @property
    def output_format(self) -> str | None:
        """As the caller named it (a transport that carries only text asks for the base64 form); None: the server's."""
        value = self.values.get("output_format")
        return None if value is None else str(value)


def build_request(
    model: str,
    prompt: str,
    options: Mapping[str, Any],
    *,
    allowed: type[GenerationOptions],
    cancel_scope: str,
    default_timeout_s: float | None,
) -> WireRequest:
    """The request to a chain, of arguments that can be put on the wire: what they may be is for the server to say.

    Raises TypeError or ValueError for one that cannot, OSError for an `image` whose file cannot be read.
    """
    for option in options.keys() - allowed.__annotations__.keys():
        nearest = difflib.get_close_matches(option, allowed.__annotations__, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(allowed.__annotations__)}"
        raise TypeError(f"unknown option {option!r}; {hint}")
    values: dict[str, str | int | float] = {"prompt": _to_wire("prompt", prompt, "BYTES")}
    for option, (tensor, datatype) in _TENSORS.items():
        if options.get(option) is not None:
            values[tensor] = _to_wire(option, options[option], datatype)
    # Fixed here, so that the request draws the same however often it is sent.
    values.setdefault("seed", secrets.randbelow(_NUM_RANDOM_SEEDS))
    image, timeout_s = options.get("image"), options.get("timeout_s")
    return WireRequest(
        model=model,
        request_id=check_text("request_id", options.get("request_id") or uuid.uuid4().hex),
        cancel_scope=cancel_scope,
        timeout_s=check_timeout(default_timeout_s if timeout_s is None else timeout_s),
        values=values,
        images=() if image is None else encode_images(image),
    )


def build_cancel_request(model: str, request_id: str, *, cancel_scope: str, timeout_s: float | None) -> WireRequest:
    """The request that cancels another. Raises TypeError or ValueError for an id that cannot be put on the wire."""
    return WireRequest(
        model=model,
        request_id=uuid.uuid4().hex,
        cancel_scope=cancel_scope,
        timeout_s=timeout_s,
        values={"request_id": check_text("request_id", request_id)},
    )


def build_families_request(model: str, name: str | None, *, timeout_s: float | None) -> WireRequest:
    """The request for what a server takes. Raises TypeError or ValueError for a name that cannot be put on the wire."""
    values = {} if name is None else {"name": check_text("name", name)}
    return WireRequest(model=model, request_id=uuid.uuid4().hex, cancel_scope="", timeout_s=timeout_s, values=values)


def build_health_request(model: str, *, timeout_s: float | None) -> WireRequest:
    """The request for how a server is: it has no inputs."""
    return WireRequest(model=model, request_id=uuid.uuid4().hex, cancel_scope="", timeout_s=timeout_s, values={})


def build_control_request(model: str, *, timeout_s: float | None) -> WireRequest:
    """The request to load or unload a model: it has no inputs."""
    return WireRequest(model=model, request_id="", cancel_scope="", timeout_s=timeout_s, values={})


def check_text(name: str, value: object) -> str:
    """The text, if it can be put on the wire. Raises TypeError or ValueError."""
    return str(_to_wire(name, value, "BYTES"))


def check_timeout(timeout_s: float | None) -> float | None:
    """The time-out for the transports: None for no limit. Raises ValueError for one that leaves no time."""
    if timeout_s is None or timeout_s == math.inf:
        return None
    if not timeout_s > 0:
        raise ValueError(f"timeout_s={timeout_s} leaves no time; give seconds above 0, or math.inf for no limit")
    return float(timeout_s)


def _to_wire(option: str, value: object, datatype: str) -> str | int | float:
    if datatype == "BYTES":
        if not isinstance(value, str):
            raise TypeError(f"{option} is {_describe(value)}; expected text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{option} has a lone surrogate, which UTF-8 cannot encode; remove it")
        return value
    if isinstance(value, bool):
        raise TypeError(f"{option} is {_describe(value)}; expected a number")
    if datatype == "FP32":
        return _to_float32(option, value)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{option} is {_describe(value)}; expected a whole number") from None
    limit = 2 ** (_INTEGER_BITS[datatype] - 1)
    if not -limit <= number < limit:
        raise ValueError(f"{option}={number} does not fit into {datatype}; give {-limit} to {limit - 1}")
    return number


def _to_float32(option: str, value: object) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{option} is {_describe(value)}; expected a number") from None
    if not math.isfinite(number) or abs(number) > _LARGEST_FLOAT32:
        raise ValueError(f"{option}={number} is not a finite 32-bit float; give a smaller number")
    return number


def _describe(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _to_array(value: str | int | float, datatype: str) -> NDArray[Any]:
    if isinstance(value, str):
        return np.array([value.encode()], dtype=np.object_)
    return np.array([value], dtype={"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}[datatype])
