"""What comes from the server, whatever carries it: tensors become results."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from triton_diffusion_client._protocol import WireRequest
from triton_diffusion_client.errors import ServerError
from triton_diffusion_client.families import Family, parse_families
from triton_diffusion_client.health import Health, parse_health
from triton_diffusion_client.results import (
    Event,
    GeneratedImage,
    GeneratedVideo,
    GenerationResult,
    Preview,
    Progress,
    Timings,
    file_format,
)

# What reading an answer raises that is not of our protocol: nothing in it is believed. (JSON may be nested too deeply.)
FOREIGN_ANSWER_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError, InferenceServerException)


@dataclass(frozen=True)
class ModelState:
    """A version of a model in the server's repository."""

    name: str
    state: str
    """"READY", "LOADING", "UNLOADING", "UNAVAILABLE"; empty: never loaded."""


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
    already. Progress that does not go forward is not told again, unless the request was started anew.

    restarts: how often the client has sent the request before.
    """

    def __init__(self, request: WireRequest, restarts: int = 0) -> None:
        self._request = request
        self._stage = ""
        self._step = -1
        self._restarts_before = self._restarts = restarts

    def read(self, outputs: Outputs) -> list[Event]:
        """What one response says: [Progress], [Progress, Preview], [Preview], [GenerationResult], or nothing.

        Raises ServerError for a response that is not of our protocol.
        """
        try:
            if (progress := _read_json(outputs, "progress")) is not None:
                return self._read_progress(progress, outputs)
            if (timings := _read_json(outputs, "timings")) is not None:
                return [_read_result(timings, outputs, self._request)]
        except FOREIGN_ANSWER_ERRORS as error:
            raise foreign_answer(error, self._request) from error
        return []

    def _read_progress(self, content: dict[str, Any], outputs: Outputs) -> list[Event]:
        remaining_s = content.get("remaining_s")
        progress = Progress(
            stage=str(content["stage"]),
            step=int(content["step"]),
            total=int(content["total"]),
            elapsed_s=float(content["elapsed_s"]),
            remaining_s=None if remaining_s is None else float(remaining_s),
            restarts=self._restarts_before + int(content.get("restarts", 0)),
        )
        events: list[Event] = []
        if self._goes_forward(progress):
            self._stage, self._step, self._restarts = progress.stage, progress.step, progress.restarts
            events.append(progress)
        previews = outputs.as_numpy("preview_image")
        if previews is not None:
            data = tuple(_read_file(preview) for preview in previews.reshape(-1))
            events.append(Preview(step=progress.step, total=progress.total, data=data))
        return events

    def _goes_forward(self, progress: Progress) -> bool:
        if progress.restarts != self._restarts:
            return progress.restarts > self._restarts
        return progress.stage != self._stage or progress.step > self._step


def read_health(outputs: Outputs, request: WireRequest) -> Health:
    """How the server is. Raises ServerError if the answer does not say."""
    try:
        return parse_health(_require(outputs, "health").item())
    except FOREIGN_ANSWER_ERRORS as error:
        raise foreign_answer(error, request) from error


def read_cancelled(outputs: Outputs, request: WireRequest) -> bool:
    """Whether the cancel request found one to cancel. Raises ServerError if the answer does not say."""
    try:
        return bool(_require(outputs, "cancelled").item())
    except FOREIGN_ANSWER_ERRORS as error:
        raise foreign_answer(error, request) from error


def read_families(outputs: Outputs, request: WireRequest) -> tuple[Family, ...]:
    """What the server takes. Raises ServerError if the answer does not say."""
    try:
        return parse_families(_require(outputs, "families").item())
    except FOREIGN_ANSWER_ERRORS as error:
        raise foreign_answer(error, request) from error


def foreign_answer(error: Exception, request: WireRequest) -> ServerError:
    """The error for an answer that is not of our protocol."""
    return ServerError(
        f"the answer of {request.model!r} is not one of triton-diffusion ({type(error).__name__}: {error}); "
        f"client and server may be of different versions",
        request_id=request.request_id,
    )


def _read_result(timings: dict[str, Any], outputs: Outputs, request: WireRequest) -> GenerationResult:
    return GenerationResult(
        outputs=tuple(_read_outputs(outputs)),
        timings=Timings(
            total_s=float(timings["total_s"]),
            queue_s=float(timings.get("queue_s", 0.0)),
            stages_s={str(stage): float(seconds) for stage, seconds in timings.get("stages_s", {}).items()},
            steps_s=tuple(float(seconds) for seconds in timings.get("steps_s", ())),
        ),
        request_id=str(timings.get("request_id") or request.request_id),
        warnings=tuple(str(warning) for warning in timings.get("warnings", ())),
    )


def _read_outputs(outputs: Outputs) -> Iterator[GeneratedImage | GeneratedVideo]:
    """Of the four tensors that pictures and videos can come in, the server sends one."""
    seeds = [int(seed) for seed in _require(outputs, "seed").reshape(-1)]
    if (pixels := outputs.as_numpy("raw_image")) is not None:
        height, width, channels = pixels.shape[1:]
        for seed, picture in zip(seeds, pixels, strict=True):
            yield GeneratedImage(seed=seed, format="raw", data=picture.tobytes(), shape=(height, width, channels))
    elif (pixels := outputs.as_numpy("raw_video")) is not None:
        num_frames, height, width, channels = pixels.shape[1:]
        for seed, frames in zip(seeds, pixels, strict=True):
            shape = (num_frames, height, width, channels)
            yield GeneratedVideo(seed=seed, format="raw", data=frames.tobytes(), shape=shape)
    elif (files := outputs.as_numpy("generated_video")) is not None:
        for seed, data in zip(seeds, map(_read_file, files.reshape(-1)), strict=True):
            yield GeneratedVideo(seed=seed, format=file_format(data), data=data)
    else:
        files = _require(outputs, "generated_image").reshape(-1)
        for seed, data in zip(seeds, map(_read_file, files), strict=True):
            yield GeneratedImage(seed=seed, format=file_format(data), data=data)


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
    """An encoded picture or video, whether it came as it is or as base64 text (the form that fits into JSON).

    No such file is base64 text by chance: PNG, JPEG, MP4 and WebM begin with a byte outside its alphabet, GIF ends with
    one, and the size at the beginning of a WebP file ends with a zero byte.
    """
    raw = content.encode() if isinstance(content, str) else content
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error:
        return raw
