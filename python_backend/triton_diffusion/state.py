"""RequestState: a request and its tensors on their way from stage to stage.

On the wire it is one safetensors blob: plain JSON in the metadata, named tensors of any dtype in the body. The Triton
processes read the header alone and hand the body on as bytes, so they never need torch. Unlike pickle, a blob runs no
code of its sender when it is read.

A stage model also takes questions and orders through the same input tensor, told apart by the metadata's only key:
about a request that it is working on (`ProgressQuery`, `CancelOrder`), and about itself (`HealthQuery`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.request import GenerationRequest

MAX_HEADER_BYTES = 4 << 20
STATE, PROGRESS, CANCEL, HEALTH = "state", "progress", "cancel", "health"
IMAGE = "image."
"""Prefix of the caller's pictures among the tensors."""


@dataclass(frozen=True)
class TensorInfo:
    """dtype (safetensors' name, such as BF16) and shape of a tensor in a blob."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class StageTimings:
    """What one stage measured for one request, in seconds."""

    queue_s: float = 0.0
    run_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)


@dataclass
class RequestState:
    """The part of the state that every process can read; the tensors stay bytes, see `tensor_infos`.

    `request_id` is scoped by the chain that made it, so that no caller can name another caller's request.
    """

    request_id: str
    request: GenerationRequest
    timings: dict[str, StageTimings] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    tensor_infos: dict[str, TensorInfo] = field(default_factory=dict)
    cancel_key: str = ""
    """What a caller can cancel the request by (`make_cancel_key`); empty: it gave no id."""
    deadlines_s: dict[str, float] = field(default_factory=dict)
    """By stage model: reading of time.monotonic(), which all processes of a machine share, by which it should be
    through. Empty: no deadline."""

    def metadata(self) -> dict[str, str]:
        """The safetensors metadata that carries this state."""
        values = {
            "request_id": self.request_id,
            "request": self.request.to_json(),
            "timings": {stage: asdict(timing) for stage, timing in self.timings.items()},
            "warnings": self.warnings,
            "cancel_key": self.cancel_key,
            "deadlines_s": self.deadlines_s,
        }
        return {STATE: json.dumps(values)}


@dataclass(frozen=True)
class ProgressQuery:
    """Asks the stage to answer as soon as the request has done more than `after_step` steps, was started anew more
    often than `after_restarts` times, or has ended.
    """

    request_id: str
    after_step: int
    after_restarts: int = 0


@dataclass(frozen=True)
class CancelOrder:
    """Tells the stage to drop requests before their next step: those of these ids, and all of this key."""

    request_ids: list[str] = field(default_factory=list)
    cancel_key: str = ""


@dataclass(frozen=True)
class Progress:
    """Where a request stands in a stage."""

    step: int
    total: int
    elapsed_s: float
    remaining_s: float | None
    """None while it waits in the queue."""
    ended: bool = False
    restarts: int = 0
    """How often it was started anew because its worker group died; `step` then goes back to the last checkpoint."""


@dataclass(frozen=True)
class HealthQuery:
    """Asks the stage how it is."""


@dataclass(frozen=True)
class StageHealth:
    """The answer to a HealthQuery."""

    stage: str
    ready: bool
    """Whether requests are taken: False while the worker groups die again and again."""
    ready_replicas: int
    num_replicas: int
    """0: the checkpoint has no such stage."""
    restarts_total: int
    reason: str = ""
    """Why it is not ready, and when it tries again; or why not all replicas are up. Else empty."""


StageInput = RequestState | ProgressQuery | CancelOrder | HealthQuery


def read_metadata(blob: bytes | memoryview) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata and the tensors' names, dtypes and shapes of a safetensors blob, without touching its body.

    Raises:
        InvalidRequestError: the bytes are not a safetensors blob.
    """
    try:
        header_bytes = int.from_bytes(blob[:8], "little")
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, len(blob) - 8):
            raise ValueError(f"header length {header_bytes} does not fit {len(blob)} bytes")
        header: dict[str, Any] = json.loads(bytes(blob[8 : 8 + header_bytes]))
        metadata: dict[str, str] = header.pop("__metadata__", {})
        infos = {name: TensorInfo(info["dtype"], tuple(info["shape"])) for name, info in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidRequestError(f"input 'state' is not a safetensors blob: {error}") from error
    return metadata, infos


def read_stage_input(blob: bytes | memoryview) -> StageInput:
    """What a blob sent to a stage model is; raises InvalidRequestError."""
    metadata, infos = read_metadata(blob)
    try:
        if PROGRESS in metadata:
            return msgspec.json.decode(metadata[PROGRESS], type=ProgressQuery)
        if CANCEL in metadata:
            return msgspec.json.decode(metadata[CANCEL], type=CancelOrder)
        if HEALTH in metadata:
            return HealthQuery()
        # Decoded by its types: a value of the wrong kind would break the scheduler, which all requests share.
        state = msgspec.json.decode(metadata[STATE], type=RequestState)
        state.tensor_infos = infos
        return state
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidRequestError(
            f"input 'state' carries no request: {type(error).__name__} {error}; "
            "stage models are called by the chain model"
        ) from error


def read_state(blob: bytes | memoryview) -> RequestState:
    """The state in a blob that must be one; raises InvalidRequestError."""
    state = read_stage_input(blob)
    if not isinstance(state, RequestState):
        raise InvalidRequestError(f"input 'state' is a {type(state).__name__}, not a request")
    return state


def image_name(index: int) -> str:
    """The name of a tensor with one of the caller's pictures."""
    return f"{IMAGE}{index}"


def write_state(state: RequestState, images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]] = ()) -> bytes:
    """A blob as a request begins: with the caller's pictures, uint8 (H, W, 3) each, and nothing else."""
    return save({image_name(index): image for index, image in enumerate(images)}, state.metadata())


def write_progress_query(query: ProgressQuery) -> bytes:
    """The blob that asks a stage how far a request is."""
    return save({}, {PROGRESS: json.dumps(asdict(query))})


def write_cancel_order(order: CancelOrder) -> bytes:
    """The blob that cancels a request in a stage."""
    return save({}, {CANCEL: json.dumps(asdict(order))})


def write_health_query() -> bytes:
    """The blob that asks a stage how it is."""
    return save({}, {HEALTH: "{}"})


def write_health(health: StageHealth) -> bytes:
    """The answer to a HealthQuery."""
    return save({}, {HEALTH: json.dumps(asdict(health))})


def read_health(blob: bytes) -> StageHealth:
    """What a stage says of itself."""
    return StageHealth(**json.loads(read_metadata(blob)[0][HEALTH]))


def write_num_cancelled(num_cancelled: int) -> bytes:
    """The answer to a CancelOrder."""
    return save({}, {CANCEL: str(num_cancelled)})


def read_num_cancelled(blob: bytes) -> int:
    """How many requests a CancelOrder has ended."""
    return int(read_metadata(blob)[0][CANCEL])


def make_cancel_key(scope: str, request_id: str) -> str:
    """What stages know a caller's request by: only who knows the scope as well can name it. Empty without an id."""
    if not request_id:
        return ""
    return hashlib.sha256(json.dumps([scope, request_id]).encode()).hexdigest()


def write_progress(progress: Progress, preview: bytes | None) -> bytes:
    """The answer to a ProgressQuery; `preview` is the state blob of a preview for the decoding stage."""
    tensors = {} if preview is None else {"preview": np.frombuffer(preview, np.uint8)}
    return save(tensors, {PROGRESS: json.dumps(asdict(progress))})


def read_progress(blob: bytes) -> tuple[Progress, bytes | None]:
    """The progress and preview that `write_progress` put together."""
    metadata, infos = read_metadata(blob)
    preview = read_tensors(blob)["preview"] if "preview" in infos else None
    return Progress(**json.loads(metadata[PROGRESS])), preview


def read_tensors(blob: bytes) -> dict[str, bytes]:
    """The raw bytes of each tensor of a blob, for processes without torch."""
    return {name: bytes(tensor["data"]) for name, tensor in deserialize(blob)}


def merge_tensors(earlier: bytes, later: bytes, *, drop: str = "") -> bytes:
    """A blob with the tensors of both, and the metadata of the later one, whose tensors count where both have a name.

    drop: prefix of tensors of the earlier one that are left out.
    """
    metadata, later_infos = read_metadata(later)
    header: dict[str, Any] = {"__metadata__": metadata}
    bodies: list[memoryview] = []
    size = 0
    names = [name for name in read_metadata(earlier)[1] if not (drop and name.startswith(drop))]
    if not set(names) - later_infos.keys():
        return later
    for blob in (earlier, later):
        header_bytes = int.from_bytes(blob[:8], "little")
        infos: dict[str, Any] = json.loads(blob[8 : 8 + header_bytes])
        infos.pop("__metadata__", None)
        for name, info in infos.items():
            if blob is earlier and (name in later_infos or name not in names):
                continue
            start, end = info["data_offsets"]
            bodies.append(memoryview(blob)[8 + header_bytes + start : 8 + header_bytes + end])
            header[name] = info | {"data_offsets": [size, size + end - start]}
            size += end - start
    return b"".join((*_encoded_header(header), *bodies))


def replace_metadata(blob: bytes, metadata: Mapping[str, str]) -> bytes:
    """The blob with other metadata; the body is copied as it is."""
    header_bytes = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + header_bytes])
    header["__metadata__"] = dict(metadata)
    return b"".join((*_encoded_header(header), memoryview(blob)[8 + header_bytes :]))


def _encoded_header(header: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """Length and text of a safetensors header."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little"), encoded
