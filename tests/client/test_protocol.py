"""Arguments to tensors."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import deserialize_bytes_tensor

from triton_diffusion_client import GenerationOptions, StreamOptions, _grpc, _http
from triton_diffusion_client._protocol import (
    WireRequest,
    build_cancel_request,
    build_families_request,
    build_request,
)

CONTRACT = {  # option: tensor, Triton data type, a value
    "negative_prompt": ("negative_prompt", "BYTES", "blur"),
    "height": ("height", "INT32", 256),
    "width": ("width", "INT32", 128),
    "num_frames": ("num_frames", "INT32", 17),
    "fps": ("fps", "FP32", 12.5),
    "flow_shift": ("flow_shift", "FP32", 8.0),
    "strength": ("strength", "FP32", 0.75),
    "num_inference_steps": ("num_inference_steps", "INT32", 20),
    "guidance_scale": ("guidance_scale", "FP32", 3.5),
    "guidance_scale_2": ("guidance_scale_2", "FP32", 1.5),
    "embedded_guidance_scale": ("embedded_guidance_scale", "FP32", 2.5),
    "seed": ("seed", "INT64", -(2**63)),
    "num_images_per_prompt": ("num_outputs", "INT32", 2),
    "max_sequence_length": ("max_sequence_length", "INT32", 48),
    "output_format": ("output_format", "BYTES", "webp"),
    "output_quality": ("output_quality", "INT32", 90),
    "preview_interval": ("preview_interval", "INT32", 4),
    "priority": ("priority", "INT32", 9),
    "deadline_s": ("deadline_s", "FP32", 2.5),
    "deadline_action": ("deadline_action", "BYTES", "continue"),
}
NOT_OF_SHAPE_1 = {"image"}
NOT_TENSORS = {"timeout_s", "request_id"}


def build(prompt: Any = "x", cancel_scope: str = "", **options: Any) -> WireRequest:
    return build_request(
        "diffusion", prompt, options, allowed=StreamOptions, cancel_scope=cancel_scope, default_timeout_s=None
    )


def head_of(post: _http.HttpRequest) -> dict[str, Any]:
    """The JSON part of a request with binary tensors."""
    head: dict[str, Any] = json.loads(post.body[: int(post.headers["Inference-Header-Content-Length"])])
    return head


def test_every_option_is_in_the_contract() -> None:
    assert set(StreamOptions.__annotations__) == set(CONTRACT) | NOT_OF_SHAPE_1 | NOT_TENSORS
    assert set(StreamOptions.__annotations__) - set(GenerationOptions.__annotations__) == {"preview_interval"}


@pytest.mark.parametrize("option", list(CONTRACT))
def test_an_option_becomes_its_tensor_over_grpc(option: str) -> None:
    tensor, datatype, value = CONTRACT[option]
    message = _grpc.to_infer_request(build(**{option: value}))
    index = [entry.name for entry in message.inputs].index(tensor)
    assert message.inputs[index].datatype == datatype
    assert list(message.inputs[index].shape) == [1]
    expected = {
        "BYTES": lambda: len(value).to_bytes(4, "little") + value.encode(),
        "INT32": lambda: value.to_bytes(4, "little", signed=True),
        "INT64": lambda: value.to_bytes(8, "little", signed=True),
        "FP32": lambda: np.float32(value).tobytes(),
    }[datatype]()
    assert message.raw_input_contents[index] == expected


@pytest.mark.parametrize("option", list(CONTRACT))
def test_an_option_becomes_its_tensor_over_http(option: str) -> None:
    tensor, datatype, value = CONTRACT[option]
    post = _http.to_infer_request(build(**{option: value}))
    inputs = {entry["name"]: entry for entry in head_of(post)["inputs"]}
    assert inputs[tensor]["datatype"] == datatype
    assert inputs[tensor]["shape"] == [1]
    assert post.path == "/v2/models/diffusion/infer"


def test_the_bare_request_has_the_prompt_and_a_seed_alone() -> None:
    message = _grpc.to_infer_request(build("ein Käfer"))
    assert [entry.name for entry in message.inputs] == ["prompt", "seed"]
    assert list(message.raw_input_contents)[:1] == [b"\x0a\x00\x00\x00" + "ein Käfer".encode()]
    assert message.model_name == "diffusion"
    assert message.id
    assert not message.parameters


def test_a_stream_over_http_is_json() -> None:
    post = _http.to_stream_request(build("x", seed=2**53 + 1, request_id="r1"))
    assert json.loads(post.body) == {"prompt": "x", "seed": 2**53 + 1, "id": "r1"}
    assert post.path == "/v2/models/diffusion/generate_stream"


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp", "mp4", "webm", "gif", "b64_mp4"])
def test_a_stream_over_http_asks_for_text(output_format: str) -> None:
    fields = json.loads(_http.to_stream_request(build(output_format=output_format)).body)
    assert fields["output_format"] == f"b64_{output_format.removeprefix('b64_')}"


def picture(mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (4, 2), None)


def encoded(kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, kind)
    return buffer.getvalue()


def test_pictures_are_one_tensor_of_their_bytes_over_grpc_and_http(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("jpeg"))
    request = build(image=[encoded("webp"), tmp_path / "a.jpg", str(tmp_path / "a.jpg"), bytearray(b"4th")])
    files = [encoded("webp"), encoded("jpeg"), encoded("jpeg"), b"4th"]
    message = _grpc.to_infer_request(request)
    tensor, content = message.inputs[-1], message.raw_input_contents[-1]
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("image", "BYTES", [4])
    assert list(deserialize_bytes_tensor(content)) == files
    post = _http.to_infer_request(request)
    tensor = head_of(post)["inputs"][-1]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("image", "BYTES", [4])
    assert post.body.endswith(content)


def test_pictures_are_base64_text_in_json() -> None:
    fields = json.loads(_http.to_stream_request(build(image=encoded())).body)
    assert [base64.b64decode(image) for image in fields["image"]] == [encoded()]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
def test_a_pil_picture_is_sent_as_png(mode: str) -> None:
    (file,) = build(image=picture(mode)).images
    with Image.open(io.BytesIO(file)) as sent:
        assert (sent.format, sent.size) == ("PNG", (4, 2))
        assert sent.mode == (mode if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "RGB")


def test_a_request_without_pictures_has_no_such_tensor() -> None:
    for request in (build(), build(image=None), build(image=[])):
        assert "image" not in [name for name, _, _ in request.tensors()]
        assert "image" not in json.loads(_http.to_stream_request(request).body)


def test_a_picture_is_in_no_log() -> None:
    assert "PNG" not in repr(build(image=encoded()))


def test_a_picture_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        build(image=tmp_path / "none.png")
    for wrong in (7, [7], np.zeros((2, 2, 3), np.uint8)):
        with pytest.raises(TypeError, match="expected bytes of a PNG, JPEG or WebP file, a path, a PIL picture"):
            build(image=wrong)


def test_the_scope_is_a_parameter_of_the_request_on_every_way() -> None:
    request = build("x", cancel_scope="team", timeout_s=2, priority=9)
    message = _grpc.to_infer_request(request)
    assert message.parameters["cancel_scope"].string_param == "team"
    assert message.parameters["timeout"].int64_param == 2_000_000
    assert head_of(_http.to_infer_request(request))["parameters"]["cancel_scope"] == "team"
    fields = json.loads(_http.to_stream_request(request).body)
    assert (fields["cancel_scope"], fields["prompt"], fields["priority"]) == ("team", "x", 9)
    assert "cancel_scope" not in [name for name, _, _ in request.tensors()]


def test_the_empty_scope_is_that_of_requests_without_one() -> None:
    request = build("x", cancel_scope="")
    assert not _grpc.to_infer_request(request).parameters
    assert "cancel_scope" not in head_of(_http.to_infer_request(request))["parameters"]
    assert "cancel_scope" not in json.loads(_http.to_stream_request(request).body)


def test_the_scope_is_a_secret_that_no_log_tells() -> None:
    assert "team" not in repr(build("x", cancel_scope="team"))


def test_a_cancel_names_the_model_the_id_and_the_scope() -> None:
    request = build_cancel_request("cancellation", "r1", cancel_scope="team", timeout_s=2)
    message = _grpc.to_infer_request(request)
    assert message.model_name == "cancellation"
    assert [(entry.name, entry.datatype, list(entry.shape)) for entry in message.inputs] == [
        ("request_id", "BYTES", [1])
    ]
    assert list(message.raw_input_contents) == [b"\x02\x00\x00\x00r1"]
    assert message.parameters["cancel_scope"].string_param == "team"
    assert message.id not in ("", "r1")
    post = _http.to_infer_request(request)
    assert post.path == "/v2/models/cancellation/infer"
    assert post.body.endswith(b"\x02\x00\x00\x00r1")
    assert head_of(post)["parameters"]["cancel_scope"] == "team"


@pytest.mark.parametrize(
    ("request_id", "error"), [(None, TypeError), (7, TypeError), (b"r1", TypeError), ("\ud800", ValueError)]
)
def test_an_id_that_cannot_be_sent_is_not_cancelled(request_id: Any, error: type) -> None:
    with pytest.raises(error, match="request_id"):
        build_cancel_request("cancellation", request_id, cancel_scope="", timeout_s=None)


def test_what_the_server_takes_is_asked_for_with_a_name_or_nothing() -> None:
    request = build_families_request("wan_families", "wan", timeout_s=2)
    message = _grpc.to_infer_request(request)
    assert (message.model_name, message.parameters["timeout"].int64_param) == ("wan_families", 2_000_000)
    assert [(entry.name, entry.datatype, list(entry.shape)) for entry in message.inputs] == [("name", "BYTES", [1])]
    post = _http.to_infer_request(build_families_request("families", None, timeout_s=None))
    assert json.loads(post.body)["inputs"] == []
    assert post.headers == {}, "Triton takes a body without inputs for a raw one if it is told a length"


def test_numpy_numbers_are_numbers() -> None:
    values = build(height=np.int64(64), guidance_scale=np.float32(2.5)).values
    assert values == {"prompt": "x", "height": 64, "guidance_scale": 2.5, "seed": 7}


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (5, {}, TypeError, r"prompt is 5 \(int\)"),
        (None, {}, TypeError, "prompt is None"),
        (["a", "b"], {}, TypeError, "prompt"),
        ("\ud800", {}, ValueError, "surrogate"),
        ("x", {"seed": 2**63}, ValueError, f"seed={2**63} does not fit into INT64"),
        ("x", {"height": 2**31}, ValueError, "height=2147483648 does not fit into INT32"),
        ("x", {"height": 64.0}, TypeError, "height is 64.0"),
        ("x", {"height": True}, TypeError, "height is True"),
        ("x", {"guidance_scale": "3.5"}, TypeError, "guidance_scale"),
        ("x", {"guidance_scale": 1e39}, ValueError, "guidance_scale"),
        ("x", {"num_frames": 16.5}, TypeError, "num_frames is 16.5"),
        ("x", {"fps": "fast"}, TypeError, "fps is 'fast'"),
        ("x", {"strength": math.inf}, ValueError, "strength=inf"),
        ("x", {"flow_shift": True}, TypeError, "flow_shift is True"),
        ("x", {"guidance_scale": float("nan")}, ValueError, "guidance_scale=nan"),
        ("x", {"output_format": b"png"}, TypeError, "output_format"),
        ("x", {"request_id": 7}, TypeError, r"request_id is 7 \(int\)"),
        ("x", {"priority": 2.5}, TypeError, "priority is 2.5"),
        ("x", {"deadline_s": "soon"}, TypeError, "deadline_s is 'soon'"),
        ("x", {"deadline_s": math.inf}, ValueError, "deadline_s=inf"),
        ("x", {"deadline_action": True}, TypeError, "deadline_action is True"),
        ("x", {"timeout_s": -1}, ValueError, "timeout_s=-1"),
        ("x", {"timeout_s": float("nan")}, ValueError, "timeout_s=nan"),
        ("x", {"num_inferense_steps": 4}, TypeError, "did you mean num_inference_steps"),
    ],
)
def test_what_cannot_be_sent_is_refused(prompt: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build(prompt, **options)


def test_what_a_picture_may_be_is_left_to_the_server() -> None:
    assert build("", height=-7, num_images_per_prompt=0, output_format="bmp").values["height"] == -7
    assert build("", num_frames=0, strength=7).values["strength"] == 7
    assert build("", priority=-1, deadline_action="hurry").values["deadline_action"] == "hurry"


def test_previews_are_not_for_single_answers() -> None:
    with pytest.raises(TypeError, match="preview_interval"):
        build_request(
            "m", "x", {"preview_interval": 1}, allowed=GenerationOptions, cancel_scope="", default_timeout_s=None
        )
