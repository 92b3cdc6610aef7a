"""Arguments to tensors, and tensors (in tritonclient's own result objects) to results."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import serialize_byte_tensor

from triton_diffusion_client import GenerationOptions, ServerError, StreamOptions, _grpc, _http
from triton_diffusion_client._protocol import (
    EventReader,
    WireRequest,
    build_cancel_request,
    build_request,
    read_cancelled,
    read_result,
)
from triton_diffusion_client.results import GenerationResult, Preview, Progress

CONTRACT = {  # option: tensor, Triton data type, a value
    "negative_prompt": ("negative_prompt", "BYTES", "blur"),
    "height": ("height", "INT32", 256),
    "width": ("width", "INT32", 128),
    "num_inference_steps": ("num_inference_steps", "INT32", 20),
    "guidance_scale": ("guidance_scale", "FP32", 3.5),
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
NOT_TENSORS = {"timeout_s", "request_id"}


def build(prompt: Any = "x", cancel_scope: str = "", **options: Any) -> WireRequest:
    return build_request(
        "diffusion", prompt, options, allowed=StreamOptions, cancel_scope=cancel_scope, default_timeout_s=None
    )


def head_of(post: _http.HttpRequest) -> dict[str, Any]:
    """The JSON part of a request with binary tensors."""
    head: dict[str, Any] = json.loads(post.body[: int(post.headers["Inference-Header-Content-Length"])])
    return head


def file_of(colour: int, file_format: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8), (colour, 0, 0)).save(buffer, file_format)
    return buffer.getvalue()


def response(**tensors: np.ndarray) -> InferResult:
    message = service_pb2.ModelInferResponse()
    for name, tensor in tensors.items():
        is_text = tensor.dtype == np.object_
        datatype = "BYTES" if is_text else {"uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}[tensor.dtype.name]
        message.outputs.add(name=name, datatype=datatype, shape=list(tensor.shape))
        message.raw_output_contents.append(serialize_byte_tensor(tensor).item() if is_text else tensor.tobytes())
    return InferResult(message)


def text(*values: str | bytes) -> np.ndarray:
    return np.array([value.encode() if isinstance(value, str) else value for value in values], dtype=np.object_)


TIMINGS = {
    "request_id": "r1",
    "total_s": 2.0,
    "queue_s": 0.5,
    "stages_s": {"denoising": 1.25},
    "steps_s": [0.5, 0.75],
    "warnings": ["no effect"],
}


def result_of(**tensors: np.ndarray) -> GenerationResult:
    return read_result(response(timings=text(json.dumps(TIMINGS)), **tensors), build())


def test_every_option_is_in_the_contract() -> None:
    assert set(StreamOptions.__annotations__) == set(CONTRACT) | NOT_TENSORS
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


def test_the_bare_request_has_the_prompt_and_asks_for_binary_png() -> None:
    message = _grpc.to_infer_request(build("ein Käfer"))
    assert [entry.name for entry in message.inputs] == ["prompt", "output_format"]
    assert list(message.raw_input_contents) == [b"\x0a\x00\x00\x00" + "ein Käfer".encode(), b"\x03\x00\x00\x00png"]
    assert message.model_name == "diffusion"
    assert message.id
    assert not message.parameters


def test_a_stream_over_http_asks_for_text() -> None:
    post = _http.to_stream_request(build("x", seed=2**53 + 1, request_id="r1"))
    assert json.loads(post.body) == {"prompt": "x", "seed": 2**53 + 1, "id": "r1", "output_format": "b64_png"}
    assert post.path == "/v2/models/diffusion/generate_stream"


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


@pytest.mark.parametrize("cancelled", [True, False])
def test_the_answer_to_a_cancel_is_read(cancelled: bool) -> None:
    assert read_cancelled(response(cancelled=np.array([cancelled])), build()) is cancelled


@pytest.mark.parametrize("tensors", [{}, {"cancelled": np.array([True, False])}, {"cancelled": np.array([], bool)}])
def test_an_answer_that_does_not_say_whether_it_cancelled_is_an_error_of_the_server(
    tensors: dict[str, np.ndarray],
) -> None:
    request = build_cancel_request("cancellation", "r1", cancel_scope="", timeout_s=None)
    with pytest.raises(ServerError, match="'cancellation'"):
        read_cancelled(response(**tensors), request)


def test_numpy_numbers_are_numbers() -> None:
    values = build(height=np.int64(64), guidance_scale=np.float32(2.5)).values
    assert values == {"prompt": "x", "height": 64, "guidance_scale": 2.5, "output_format": "png"}


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
    assert build("", height=-7, num_images_per_prompt=0, output_format="gif").values["height"] == -7
    assert build("", priority=-1, deadline_action="hurry").values["deadline_action"] == "hurry"


def test_previews_are_not_for_single_answers() -> None:
    with pytest.raises(TypeError, match="preview_interval"):
        build_request(
            "m", "x", {"preview_interval": 1}, allowed=GenerationOptions, cancel_scope="", default_timeout_s=None
        )


def test_a_result_is_read() -> None:
    files = [file_of(1), file_of(2)]
    result = result_of(seed=np.array([5, 6], np.int64), generated_image=text(*files))
    assert result.data == files
    assert [output.array[0, 0, 0] for output in result.outputs] == [1, 2]
    assert result.seeds == [5, 6]
    assert result.request_id == "r1"
    assert result.warnings == ("no effect",)
    assert (result.timings.total_s, result.timings.queue_s) == (2.0, 0.5)
    assert result.timings.stages_s == {"denoising": 1.25}
    assert result.timings.steps_s == (0.5, 0.75)


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_files_are_told_from_base64_text(file_format: str) -> None:
    file = file_of(200, file_format)
    for content in (file, base64.b64encode(file)):
        result = result_of(seed=np.array([1], np.int64), generated_image=text(content))
        assert result.data == [file]


def test_raw_pixels_are_read_and_can_be_saved(tmp_path: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3), dtype=np.uint8)
    result = result_of(seed=np.array([1, 2], np.int64), raw_image=pixels)
    assert (result.arrays == pixels).all()
    assert [output.format for output in result.outputs] == ["raw", "raw"]
    path = result.outputs[1].save(tmp_path / "picture.png")
    assert (np.asarray(Image.open(path)) == pixels[1]).all()


def test_a_file_is_saved_as_it_came(tmp_path: Any) -> None:
    result = result_of(seed=np.array([1], np.int64), generated_image=text(file_of(3, "webp")))
    assert result.outputs[0].save(tmp_path / "a.webp").read_bytes() == file_of(3, "webp")


def progress_at(step: int, **values: Any) -> np.ndarray:
    content = {"stage": "denoising", "step": step, "total": 20, "elapsed_s": 1.5, "remaining_s": None, **values}
    return text(json.dumps(content))


def test_progress_is_read() -> None:
    reader = EventReader(build())
    for remaining_s in (None, 8.5):
        step = 1 if remaining_s is None else 2
        assert reader.read(response(progress=progress_at(step, remaining_s=remaining_s))) == [
            Progress(stage="denoising", step=step, total=20, elapsed_s=1.5, remaining_s=remaining_s)
        ]


def test_a_preview_comes_after_the_progress_in_the_same_response() -> None:
    progress, preview = EventReader(build()).read(
        response(progress=progress_at(3), preview_image=text(base64.b64encode(file_of(9))))
    )
    assert isinstance(progress, Progress)
    assert isinstance(preview, Preview)
    assert (preview.step, preview.total, preview.data) == (3, 20, (file_of(9),))
    assert preview.images[0].size == (16, 8)


def test_a_late_preview_does_not_turn_progress_back() -> None:
    reader = EventReader(build())
    picture = text(file_of(9))
    responses = [
        response(progress=progress_at(4)),
        response(progress=progress_at(5)),
        response(progress=progress_at(4), preview_image=picture),
        response(progress=progress_at(6)),
        response(progress=progress_at(6), preview_image=picture),
        response(progress=progress_at(1, stage="decoding")),
    ]
    events = [(type(event), event.step) for each in responses for event in reader.read(each)]  # type: ignore[union-attr]
    assert events == [(Progress, 4), (Progress, 5), (Preview, 4), (Progress, 6), (Preview, 6), (Progress, 1)]


def test_an_empty_response_says_nothing() -> None:
    """Triton may end a decoupled request with a response that has only the final flag."""
    assert EventReader(build()).read(response()) == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"timings": text("{}")},
        {"timings": text("not JSON")},
        {"timings": text("[]")},
        {"timings": text(json.dumps(TIMINGS))},
        {"timings": text(json.dumps(TIMINGS)), "seed": np.array([1], np.int64)},
        {"timings": text(json.dumps(TIMINGS)), "seed": np.array([1, 2], np.int64), "generated_image": text(b"x")},
        {"progress": text('{"stage": "denoising"}')},
    ],
)
def test_an_answer_of_another_protocol_is_an_error_of_the_server(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(ServerError, match="'diffusion'"):
        EventReader(build()).read(response(**tensors))


def test_events_may_arrive_in_any_pieces() -> None:
    progress = {"stage": "denoising", "step": 1, "total": 2, "elapsed_s": 0.5, "remaining_s": None}
    body = b"".join(b"data: " + json.dumps({"progress": json.dumps(progress)}).encode() + b"\n\n" for _ in range(3))
    for size in (1, 7, 64, len(body)):
        decoder = _http.EventDecoder(build())
        pieces = [body[start : start + size] for start in range(0, len(body), size)]
        outputs = [outputs for piece in pieces for outputs in decoder.decode_outputs(piece)]
        events = [event for output in outputs for event in EventReader(build()).read(output)]
        assert [event.total for event in events if isinstance(event, Progress)] == [2, 2, 2]


def test_an_event_that_is_no_json_is_an_error_of_the_server() -> None:
    with pytest.raises(ServerError, match="not JSON"):
        _http.EventDecoder(build()).decode(b"data: {broken\n\n")
