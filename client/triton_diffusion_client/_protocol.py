"""What goes over the wire, whatever carries it: arguments to tensors, and tensors to results.

The model `diffusion` answers once; `diffusion_stream` sends progress first; `cancellation` cancels what either has in
work. An argument that is not set is not sent: the server knows the defaults of its checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import math
import operator
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from triton_diffusion_client.errors import ServerError
from triton_diffusion_client.results import (
    Event,
    GeneratedImage,
    GenerationResult,
    Preview,
    Progress,
    Timings,
)

TransportName = Literal["grpc", "http"]
OutputFormat = Literal["png", "jpeg", "webp", "raw"]
DeadlineAction = Literal["refuse", "drop", "continue"]


class GenerationOptions(TypedDict, total=False):
    """The options of a request, named as in diffusers' pipelines. None is the same as not given: the server decides."""

    negative_prompt: str | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    """Classifier-free guidance: mixes the predictions with and without the prompt."""
    embedded_guidance_scale: float | None
    """For a guidance-distilled model (FLUX.1-dev): a number the model takes in."""
    seed: int | None
    """Of the first picture. Without one the server draws it, and the result tells it."""
    num_images_per_prompt: int | None
    max_sequence_length: int | None
    """Tokens of the prompt that the text encoder sees."""
    output_format: OutputFormat | None
    """"png" unless told otherwise; "raw" sends the pixels."""
    output_quality: int | None
    """1 to 100, for jpeg and webp."""
    timeout_s: float | None
    """Longest wait for the whole request, in place of the client's own `timeout_s`; math.inf: none."""
    request_id: str | None
    """The id under which the server's log names the request and `cancel` finds it; without one the client makes it."""
    priority: int | None
    """0 to 9: requests of 9 go first, those of 0 last; the server's default is 5."""
    deadline_s: float | None
    """Seconds after its arrival at the server within which the picture is wanted."""
    deadline_action: DeadlineAction | None
    """What becomes of a request that cannot meet `deadline_s`, by the server's estimate: "refuse" (the server's
    default) refuses it at once, and drops it later if it cannot be met any more; "drop" tries, and drops it once it
    cannot be met any more; "continue" finishes it late: the deadline only orders the queue."""


class StreamOptions(GenerationOptions, total=False):
    """The options of a stream: those of a request, and when to send previews."""

    preview_interval: int | None
    """A preview every so many steps; 0: none."""


# Option -> tensor and Triton data type. The other options are not tensors.
_TENSORS = {
    "negative_prompt": ("negative_prompt", "BYTES"),
    "height": ("height", "INT32"),
    "width": ("width", "INT32"),
    "num_inference_steps": ("num_inference_steps", "INT32"),
    "guidance_scale": ("guidance_scale", "FP32"),
    "embedded_guidance_scale": ("embedded_guidance_scale", "FP32"),
    "seed": ("seed", "INT64"),
    "num_images_per_prompt": ("num_outputs", "INT32"),
    "max_sequence_length": ("max_sequence_length", "INT32"),
    "output_quality": ("output_quality", "INT32"),
    "preview_interval": ("preview_interval", "INT32"),
    "priority": ("priority", "INT32"),
    "deadline_s": ("deadline_s", "FP32"),
    "deadline_action": ("deadline_action", "BYTES"),
}
_DATATYPES = {**dict(_TENSORS.values()), "prompt": "BYTES", "output_format": "BYTES", "request_id": "BYTES"}
_INTEGER_BITS = {"INT32": 32, "INT64": 64}
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class WireRequest:
    """A request as every transport sends it: for pictures, or to cancel such a request."""

    model: str
    request_id: str
    cancel_scope: str = field(repr=False)
    """Whoever names it can cancel the request; empty: not sent, the scope of all who name none."""
    timeout_s: float | None
    """None: wait as long as it takes."""
    values: Mapping[str, str | int | float]
    """By tensor name; each tensor has the shape [1]."""

    def tensors(self) -> Iterator[tuple[str, str, NDArray[Any]]]:
        """Name, Triton data type and content (shape [1]) of each input tensor."""
        for name, value in self.values.items():
            yield name, _DATATYPES[name], _to_array(value, _DATATYPES[name])

    @property
    def parameters(self) -> Mapping[str, str]:
        """Triton's request parameters, but for the time-out, which each transport sends in its own way."""
        return {"cancel_scope": self.cancel_scope} if self.cancel_scope else {}

    @property
    def output_format(self) -> str:
        """As the caller named it; a transport that carries only text asks for the base64 form."""
        return str(self.values["output_format"])


def build_request(
    model: str,
    prompt: str,
    options: Mapping[str, Any],
    *,
    allowed: type[GenerationOptions],
    cancel_scope: str,
    default_timeout_s: float | None,
) -> WireRequest:
    """The request for pictures, of arguments that can be put on the wire: what they may be is for the server to say.

    Raises TypeError or ValueError for one that cannot.
    """
    for option in options.keys() - allowed.__annotations__.keys():
        nearest = difflib.get_close_matches(option, allowed.__annotations__, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(allowed.__annotations__)}"
        raise TypeError(f"unknown option {option!r}; {hint}")
    values: dict[str, str | int | float] = {"prompt": _to_wire("prompt", prompt, "BYTES")}
    for option, (tensor, datatype) in _TENSORS.items():
        if options.get(option) is not None:
            values[tensor] = _to_wire(option, options[option], datatype)
    output_format = options.get("output_format")
    values["output_format"] = _to_wire("output_format", "png" if output_format is None else output_format, "BYTES")
    timeout_s = options.get("timeout_s")
    return WireRequest(
        model=model,
        request_id=check_text("request_id", options.get("request_id") or uuid.uuid4().hex),
        cancel_scope=cancel_scope,
        timeout_s=check_timeout(default_timeout_s if timeout_s is None else timeout_s),
        values=values,
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


class Outputs(Protocol):
    """One response: both tritonclient's InferResult classes are this."""

    def as_numpy(self, name: str) -> NDArray[Any] | None:
        """The output tensor, or None if the response has none of that name."""


def read_result(outputs: Outputs, request: WireRequest) -> GenerationResult:
    """The result in the one response of a request. Raises ServerError if there is none."""
    for event in EventReader(request).read(outputs):
        if isinstance(event, GenerationResult):
            return event
    raise missing_result(request)


def missing_result(request: WireRequest) -> ServerError:
    """The error for an answer that ends without a result."""
    return ServerError(
        f"{request.model!r} ended the request without a result; the server's log says more",
        request_id=request.request_id,
    )


class EventReader:
    """Makes events of a request's responses.

    A preview takes time to decode: it comes with the progress it belongs to, perhaps when later progress has been sent
    already. Progress that does not go forward is not told again.
    """

    def __init__(self, request: WireRequest) -> None:
        self._request = request
        self._stage = ""
        self._step = -1

    def read(self, outputs: Outputs) -> list[Event]:
        """What one response says: [Progress], [Progress, Preview], [Preview], [GenerationResult], or nothing.

        Raises ServerError for a response that is not of our protocol.
        """
        try:
            if (progress := _read_json(outputs, "progress")) is not None:
                return self._read_progress(progress, outputs)
            if (timings := _read_json(outputs, "timings")) is not None:
                return [_read_result(timings, outputs, self._request)]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _foreign_answer(error, self._request) from error
        return []

    def _read_progress(self, content: dict[str, Any], outputs: Outputs) -> list[Event]:
        remaining_s = content.get("remaining_s")
        progress = Progress(
            stage=str(content["stage"]),
            step=int(content["step"]),
            total=int(content["total"]),
            elapsed_s=float(content["elapsed_s"]),
            remaining_s=None if remaining_s is None else float(remaining_s),
        )
        events: list[Event] = []
        if progress.stage != self._stage or progress.step > self._step:
            self._stage, self._step = progress.stage, progress.step
            events.append(progress)
        previews = outputs.as_numpy("preview_image")
        if previews is not None:
            data = tuple(_read_file(preview) for preview in previews.reshape(-1))
            events.append(Preview(step=progress.step, total=progress.total, data=data))
        return events


def read_cancelled(outputs: Outputs, request: WireRequest) -> bool:
    """Whether the cancel request found one to cancel. Raises ServerError if the answer does not say."""
    try:
        return bool(_require(outputs, "cancelled").item())
    except (ValueError, KeyError) as error:
        raise _foreign_answer(error, request) from error


def _foreign_answer(error: Exception, request: WireRequest) -> ServerError:
    return ServerError(
        f"the answer of {request.model!r} is not one of triton-diffusion ({type(error).__name__}: {error}); "
        f"client and server may be of different versions",
        request_id=request.request_id,
    )


def _read_result(timings: dict[str, Any], outputs: Outputs, request: WireRequest) -> GenerationResult:
    return GenerationResult(
        outputs=tuple(_read_images(outputs, request.output_format)),
        timings=Timings(
            total_s=float(timings["total_s"]),
            queue_s=float(timings.get("queue_s", 0.0)),
            stages_s={str(stage): float(seconds) for stage, seconds in timings.get("stages_s", {}).items()},
            steps_s=tuple(float(seconds) for seconds in timings.get("steps_s", ())),
        ),
        request_id=str(timings.get("request_id") or request.request_id),
        warnings=tuple(str(warning) for warning in timings.get("warnings", ())),
    )


def _read_images(outputs: Outputs, output_format: str) -> Iterator[GeneratedImage]:
    seeds = _require(outputs, "seed").reshape(-1).tolist()
    pixels = outputs.as_numpy("raw_image")
    if pixels is not None:
        height, width, channels = pixels.shape[1:]
        for seed, picture in zip(seeds, pixels, strict=True):
            yield GeneratedImage(seed=int(seed), format="raw", data=picture.tobytes(), shape=(height, width, channels))
        return
    files = _require(outputs, "generated_image").reshape(-1)
    for seed, file in zip(seeds, files, strict=True):
        yield GeneratedImage(seed=int(seed), format=output_format.removeprefix("b64_"), data=_read_file(file))


def _read_json(outputs: Outputs, name: str) -> dict[str, Any] | None:
    tensor = outputs.as_numpy(name)
    if tensor is None or tensor.size == 0:
        return None
    content: dict[str, Any] = json.loads(tensor.reshape(-1)[0])
    return content


def _require(outputs: Outputs, name: str) -> NDArray[Any]:
    tensor = outputs.as_numpy(name)
    if tensor is None:
        raise KeyError(f"output {name!r}")
    return tensor


def _read_file(content: bytes | str) -> bytes:
    """An encoded picture, whether it came as it is or as base64 text (the form that fits into JSON).

    No picture file is base64 text by chance: PNG and JPEG begin with a byte outside its alphabet, and the size at the
    beginning of a WebP file ends with a zero byte.
    """
    raw = content.encode() if isinstance(content, str) else content
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error:
        return raw
