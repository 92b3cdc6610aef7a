"""Every input wrong in every way, made by hypothesis."""

from __future__ import annotations

import json
import struct
from functools import partial
from typing import Any

from hypothesis import strategies as st

from benchmarks.hostile.cases import Case, small_request
from benchmarks.hostile.wire import RawRequest, RawTensor, bytes_elements

_SIZES = {"BOOL": 1, "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "FP16": 2, "BF16": 2}
_SIZES |= {"UINT32": 4, "INT32": 4, "FP32": 4, "UINT64": 8, "INT64": 8, "FP64": 8}
_INTEGERS = [-(2**31), -1, 0, 1, 2, 3, 7, 15, 16, 17, 32, 65_537, 65_552, 2**31 - 16, 2**31 - 1]
_FLOATS = [0.0, -0.0, 1.0, 2.5, -1.0, 1e-45, 1e30, 3.4e38, float("nan"), float("inf"), float("-inf")]
_TEXTS = [
    *(b"", b" \n\t", b"\0", b"a\0b", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"a" * 17_000, "💠".encode() * 5_000),
    *(b"../../etc/passwd", b"file:///etc/passwd", b"http://127.0.0.1:8000/", b"${jndi:ldap://x}", b"%s%n%x"),
    *(b"{}", b"[]", b"null", b'{"state": 1}', b"raw", b"png", b"b64_png", b"refuse", b"drop", b"continue", b"a star"),
    "‮﻿\u0000𝔘".encode(),
]
_SHAPES: list[list[int]] = [[], [0], [1], [2], [1, 1], [1, 0], [-1], [-(2**63)], [2**31], [2**62], [2**62, 4], [1] * 40]
_MODELS = ["diffusion"] * 8 + ["diffusion_stream", "cancellation", "families"]


def _value(datatype: str) -> st.SearchStrategy[bytes]:
    """The bytes of one element."""
    if datatype == "BYTES":
        text = st.one_of(st.sampled_from(_TEXTS), st.binary(max_size=40), st.text(max_size=20).map(_encode))
        return text.map(lambda value: bytes_elements([value]))
    if datatype == "FP32":
        numbers = st.one_of(st.sampled_from(_FLOATS), st.floats(width=32))
        return numbers.map(lambda value: struct.pack("<f", value))
    size = _SIZES.get(datatype, 4)
    low, high = -(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1
    integers = [value for value in [*_INTEGERS, 2**62, 2**63 - 1, -(2**63)] if low <= value <= high]
    return st.sampled_from(integers).map(lambda value: value.to_bytes(size, "little", signed=True))


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


@st.composite
def _tensor(draw: st.DrawFn, name: str, datatype: str) -> RawTensor:
    """An input with a bad value, or with a type, shape or size that is not its own."""
    data, shape = draw(_value(datatype)), [1]
    match draw(st.sampled_from(["value"] * 5 + ["type", "shape", "size", "count"])):
        case "type":
            other = draw(st.sampled_from([*_SIZES, "BYTES", "", "INT3", "fp32", "\0"]))
            data, datatype = draw(st.sampled_from([data, draw(_value(other))])), other
        case "shape":
            shape = draw(st.sampled_from(_SHAPES))
        case "size":
            data = draw(
                st.sampled_from([b"", data[:-1], data + b"\0", b"\xff" * 4, b"\xff\xff\xff\x7f" + data, data * 3])
            )
        case "count":
            count = draw(st.sampled_from([0, 2, 100, 50_000]))
            data, shape = data[:64] * count, [count]
    return RawTensor(name, datatype, shape, data)


@st.composite
def value_cases(draw: st.DrawFn, inputs: dict[str, str]) -> Case:
    """An inference request of which up to three inputs are wrong; `inputs` are datatypes by name."""
    tensors: dict[str, RawTensor] = dict(small_request())
    for name in draw(st.lists(st.sampled_from(sorted(inputs)), max_size=3, unique=True)):
        tensors[name] = draw(_tensor(name, inputs[name]))
    sent = list(tensors.values())
    match draw(st.sampled_from(["as it is"] * 6 + ["without one", "twice", "unknown"])):
        case "without one":
            sent.remove(draw(st.sampled_from(sent)))
        case "twice":
            sent.append(draw(st.sampled_from(sent)))
        case "unknown":
            sent.append(draw(_tensor(draw(st.text(max_size=12)), draw(st.sampled_from(["INT32", "BYTES"])))))
    request = RawRequest(
        sent,
        model=draw(st.sampled_from(_MODELS)),
        request_id=draw(st.sampled_from(["", "", "a", "x" * 5000, "\0", "../..", "💠"])),
        outputs=draw(st.sampled_from([(), (), (), ("generated_image",), ("timings", "timings"), ("nothing",)])),
    )
    words = f"{request.model}: " + ", ".join(f"{each.name} {each.datatype} {list(each.shape)}" for each in sent)[:300]
    if request.model == "diffusion_stream" and draw(st.booleans()):
        return Case("values, gRPC stream", words, lambda connection: connection.stream_grpc(request))
    if draw(st.booleans()):
        return Case("values, gRPC", words, lambda connection: connection.infer_grpc(request))
    return Case("values, HTTP", words, lambda connection: connection.infer_http(request))


_json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([*_INTEGERS, 2**63, 2**64, -(2**63), 10**400, 1e308, float("nan"), float("inf")]),
        st.sampled_from(_TEXTS).map(lambda text: text.decode(errors="replace")),
        st.text(max_size=20),
        st.just("\ud800"),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def json_cases(draw: st.DrawFn, inputs: dict[str, str]) -> Case:
    """A body of /generate, /generate_stream or /infer in JSON alone."""
    content: Any = {
        "prompt": "a circle",
        "height": 16,
        "width": 16,
        "num_inference_steps": 1,
        "max_sequence_length": 8,
    }
    for name in draw(st.lists(st.sampled_from([*inputs, "nothing"]), max_size=3)):
        content[name] = draw(_json_values)
    action = draw(st.sampled_from(["diffusion/generate", "diffusion_stream/generate_stream", "diffusion/infer"]))
    if action.endswith("infer"):
        content = {
            "inputs": [
                {"name": name, "datatype": inputs.get(name, "BYTES"), "shape": [1], "data": value}
                for name, value in content.items()
            ]
        }
    text = json.dumps(content)
    return Case(f"JSON, {action}", text[:300], partial(_post, f"/v2/models/{action}", text.encode()))


def _post(path: str, body: bytes, connection: Any) -> Any:
    return connection.post(path, body)
