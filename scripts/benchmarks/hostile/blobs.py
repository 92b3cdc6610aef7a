"""Damaged states sent to the stages: without the key of the server's models, and with it, to see what lies behind."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import save

from benchmarks.hostile.answers import DOCUMENTED, FROM_STAGES
from benchmarks.hostile.cases import Case
from benchmarks.hostile.wire import RawRequest, RawTensor
from triton_diffusion.request import GenerationRequest
from triton_diffusion.stage_key import PARAMETER, key_of_server
from triton_diffusion.state import (
    CancelOrder,
    ProgressQuery,
    RequestState,
    write_cancel_order,
    write_progress_query,
)

_STAGES = ("text_encoding", "denoising", "decoding")
_REQUEST = GenerationRequest(
    prompt="a circle",
    negative_prompt="",
    height=16,
    width=16,
    num_inference_steps=1,
    guidance_scale=1.0,
    embedded_guidance_scale=3.5,
    seed=1,
    num_outputs=1,
    max_sequence_length=8,
    output_format="png",
    output_quality=90,
)


def blob_cases(rng: random.Random) -> Iterator[Case]:
    """Without end: each hand-made state, and between them good ones that were damaged."""
    for number in range(1 << 62):
        good = _good(rng, f"hostile-{number}")
        for words, blob in _hand_made(rng, good).items():
            yield _case(rng, words, blob)


def _case(rng: random.Random, words: str, blob: bytes) -> Case:
    stage, over_http = rng.choice(_STAGES), rng.random() < 0.5
    has_key = rng.random() < 0.7

    def send(connection: Any) -> Any:
        parameters = {PARAMETER: key_of_server(connection.server_pid)} if has_key else {}
        request = RawRequest([RawTensor("state", "UINT8", [len(blob)], blob)], stage, parameters=parameters)
        return connection.infer_http(request) if over_http else connection.infer_grpc(request)

    allowed = FROM_STAGES if has_key else DOCUMENTED - {"OK", "HTTP 200"}
    return Case(f"states, {'with' if has_key else 'without'} the key", f"{stage}: {words}", send, allowed)


def _good(rng: random.Random, request_id: str) -> bytes:
    """A state with tensors that may be those of the stage, of another one, or of none."""
    value = rng.choice([0.0, np.nan])
    tensors: dict[str, Any] = {
        "prompt_embeds": _filled(value, 1, 8, rng.choice([48, 64, 4096])),
        "pooled_prompt_embeds": _filled(value, 1, rng.choice([32, 64, 768])),
        "latents": _filled(value, 1, rng.choice([1, 4]), rng.choice([64, 16])),
        "image.0": np.zeros((16, 16, 3), np.uint8),
    }
    kept = {name: tensors[name] for name in tensors if rng.random() < 0.7}
    return save(kept, RequestState(request_id, _REQUEST).metadata())


def _filled(value: float, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full(shape, value, np.float32)


def _hand_made(rng: random.Random, good: bytes) -> dict[str, bytes]:
    header_bytes = int.from_bytes(good[:8], "little")
    header: dict[str, Any] = json.loads(good[8 : 8 + header_bytes])
    damaged = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        damaged[8 + int(rng.random() * header_bytes)] = rng.randrange(256)
    return {
        "as a stage might send it": good,
        "cut off": good[: rng.randint(0, len(good) - 1)],
        "bytes changed": bytes(damaged),
        "random": rng.randbytes(rng.randint(0, 200)),
        "a header length of its own": struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1])) + good[8:],
        "a deep header": _blob_of(b"[" * 100_000),
        "no object": _blob_of(rng.choice([b"null", b"[]", b"7", b'"x"', b"{}", b'{"__metadata__":7}'])),
        "no request": _blob_of(json.dumps({"__metadata__": {"state": rng.choice(["", "{}", "[]", "null"])}}).encode()),
        "another header": _blob_of(json.dumps(_changed(rng, header)).encode()) + good[8 + header_bytes :],
        "another request": _blob_of(json.dumps(_with_request(rng, header)).encode()) + good[8 + header_bytes :],
        "an order for others": write_cancel_order(CancelOrder(["", "x", f"{rng.random()}"], rng.choice(["", "0"]))),
        "a question about others": write_progress_query(ProgressQuery(f"x-{rng.randrange(9)}", -(2**63))),
    }


def _blob_of(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _changed(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A tensor's entry that does not fit its bytes, or another tensor's."""
    names = [name for name in header if name != "__metadata__"] or ["latents"]
    entry = dict(header.get(names[0], {}))
    key = rng.choice(["dtype", "shape", "data_offsets"])
    wrong: dict[str, list[Any]] = {
        "dtype": ["F64", "BF16", "F128", "", 7, None, "BOOL"],
        "shape": [[], [0], [2**62, 4], [-1], ["1"], None, [1] * 1000, 10**400],
        "data_offsets": [[0, 0], [0, 2**62], [8, 4], [-8, 8], [0], None, ["0", "8"]],
    }
    entry[key] = rng.choice(wrong[key])
    return header | {rng.choice([*names, "latents", "", "💠"]): entry}


def _with_request(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A value of the request that is of another type or far out of bounds."""
    state = json.loads(header["__metadata__"]["state"])
    name = rng.choice([*state["request"], "request_id", "timings", "warnings", "deadlines_s", "cancel_key", "nothing"])
    values: list[Any] = [None, [], {}, "", "x", -1, 0, 2**31, 2**63, 10**400, 1.5, True, [[]], {"": 1}, "\ud800"]
    (state["request"] if name in state["request"] else state)[name] = rng.choice(values)
    return header | {"__metadata__": {"state": json.dumps(state)}}
