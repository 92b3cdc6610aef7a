"""Triton's tensors, parameters and errors to plain Python and back."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from triton_diffusion.config import RequestLimits
from triton_diffusion.errors import (
    DiffusionError,
    InvalidRequestError,
    ShuttingDownError,
    StageError,
    WorkerGroupError,
    caller_message,
    from_wire,
    is_wire_name,
    to_wire,
)
from triton_diffusion.media import decode_image
from triton_diffusion.stage_key import PARAMETER, own_key

STATE = "state"
IMAGE_INPUT = "image"
# What Triton says when a stage is called while the server ends.
_STOPPING = ("Server not ready", "Server is stopping")
# What it says of a model whose process died, or which is loaded anew.
_AWAY = ("is not healthy", "is not ready", "has no available versions", "Request for unknown model")
_decoding = threading.BoundedSemaphore(2)


def read_parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The `parameters` of a model's config.pbtxt, from the arguments of `initialize`."""
    parameters = json.loads(args["model_config"]).get("parameters", {})
    return {name: value["string_value"] for name, value in parameters.items()}


def uses_response_cache(args: Mapping[str, str]) -> bool:
    """Whether Triton answers equal requests to this model from its cache."""
    cache = json.loads(args["model_config"]).get("response_cache", {})
    return bool(cache.get("enable"))


def read_cancel_scope(request: Any) -> str:
    """The request parameter `cancel_scope`; empty where none was sent."""
    parameters = json.loads(request.parameters() or "{}")
    return str(parameters.get("cancel_scope", ""))


def set_up_logging(model_name: str) -> None:
    """Log lines of this process go to Triton's standard error, under the model's name."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s {model_name} %(name)s: %(message)s")


def read_inputs(request: Any, names: Sequence[str]) -> dict[str, Any]:
    """Python values of the inputs, each of shape [1], that a request carries.

    Raises:
        InvalidRequestError: a tensor has another shape, or text is not UTF-8.
    """
    values: dict[str, Any] = {}
    for name in names:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        array = tensor.as_numpy()
        if array.size != 1:
            raise InvalidRequestError(
                f"input {name!r} has shape {list(array.shape)}; it must hold one value, shape [1]"
            )
        value = array.reshape(-1)[0]
        values[name] = _decode(name, value) if isinstance(value, bytes) else value.item()
    return values


def read_image_files(request: Any) -> list[bytes]:
    """The encoded pictures of the input `image`."""
    tensor = pb_utils.get_input_tensor_by_name(request, IMAGE_INPUT)
    return [] if tensor is None else [bytes(value) for value in tensor.as_numpy().reshape(-1)]


def decode_images(files: Sequence[bytes], limits: RequestLimits) -> list[Any]:
    """The pictures, uint8 (H, W, 3) each; raises InvalidRequestError."""
    pictures: list[Any] = []
    pixels_left = limits.max_image_pixels
    for index, value in enumerate(files):
        name = f"{IMAGE_INPUT}[{index}]" + (" behind the others" if index else "")
        # A decoder takes several times the memory of the picture, so few run at a time.
        with _decoding:
            picture = decode_image(value, name=name, max_pixels=pixels_left, max_bytes=limits.max_image_bytes)
        pixels_left -= picture.shape[0] * picture.shape[1]
        pictures.append(picture)
    return pictures


def _decode(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"input {name!r} is not UTF-8 text: {error}") from error


def bytes_tensor(name: str, values: Sequence[bytes]) -> Any:
    """A TYPE_STRING tensor."""
    return pb_utils.Tensor(name, np.array(values, dtype=np.object_))


def json_tensor(name: str, value: Any) -> Any:
    """A TYPE_STRING tensor of shape [1] with JSON text."""
    return bytes_tensor(name, [json.dumps(value).encode()])


def state_tensor(blob: bytes) -> Any:
    """The one tensor of a stage model."""
    return pb_utils.Tensor(STATE, np.frombuffer(blob, dtype=np.uint8))


def read_state_tensor(tensor: Any) -> bytes:
    """The bytes of a stage model's tensor."""
    data: bytes = tensor.as_numpy().tobytes()
    return data


def triton_error(error: BaseException) -> Any:
    """A TritonError with the code that belongs to the class of `error`."""
    error = from_wire(*to_wire(error))
    text = f"{error.MESSAGE_PREFIX}{caller_message(error)}"
    return pb_utils.TritonError(text, getattr(pb_utils.TritonError, error.triton_code))


def stage_call(model: str, blob: bytes) -> bytes:
    """Ask a stage model by BLS, and wait for its answer; raises the stage's error."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[STATE],
        inputs=[state_tensor(blob)],
        parameters={PARAMETER: own_key()},
    )
    response = request.exec()
    if response.has_error():
        raise from_stage_error(response.error())
    return read_state_tensor(pb_utils.get_output_tensor_by_name(response, STATE))


def stage_error(error: DiffusionError) -> Any:
    """What a stage model answers the chain: BLS turns every code into INTERNAL, so the class goes into the message."""
    return pb_utils.TritonError(": ".join(to_wire(error)), getattr(pb_utils.TritonError, error.triton_code))


def from_stage_error(error: Any) -> DiffusionError:
    """The error that `stage_error` made, or a StageError for one of Triton's own."""
    name, _, message = error.message().partition(": ")
    if is_wire_name(name):
        return from_wire(name, message)
    if any(phrase in error.message() for phrase in _STOPPING):
        return ShuttingDownError("the server is stopping; try again at another one")
    if any(phrase in error.message() for phrase in _AWAY):
        return WorkerGroupError(f"a stage is away, and has to be loaded anew: {error.message()}; try again later")
    return StageError(error.message())


def send_final(sender: Any, response: Any) -> None:
    """Send the last response of a request."""
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
