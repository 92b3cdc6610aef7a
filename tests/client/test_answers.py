"""Tensors (in tritonclient's own result objects) to results."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.client.conftest import FAMILIES, VIDEO_FILES
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import serialize_byte_tensor

from triton_diffusion_client import Family, GeneratedVideo, Parameter, ServerError, StreamOptions, _http
from triton_diffusion_client._answers import EventReader, read_cancelled, read_families, read_result
from triton_diffusion_client._protocol import WireRequest, build_cancel_request, build_families_request, build_request
from triton_diffusion_client.results import GenerationResult, Preview, Progress, file_format


def build() -> WireRequest:
    return build_request("diffusion", "x", {}, allowed=StreamOptions, cancel_scope="", default_timeout_s=None)


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


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_picture_files_are_told_from_base64_text_and_by_their_format(kind: str) -> None:
    file = file_of(200, kind)
    for content in (file, base64.b64encode(file)):
        result = result_of(seed=np.array([1], np.int64), generated_image=text(content))
        assert result.data == [file]
        assert result.outputs[0].format == kind
        assert result.videos == []


@pytest.mark.parametrize(("kind", "file"), VIDEO_FILES.items())
def test_video_files_are_told_from_base64_text_and_by_their_format(kind: str, file: bytes, tmp_path: Any) -> None:
    for content in (file, base64.b64encode(file)):
        result = result_of(seed=np.array([5, 6], np.int64), generated_video=text(content, content))
        assert result.videos == result.data == [file, file]
        assert [output.format for output in result.outputs] == [kind, kind]
        assert (result.seeds, result.images) == ([5, 6], [])
        assert result.outputs[1].save(tmp_path / "a").read_bytes() == file
        with pytest.raises(ValueError, match=f'{kind} file; ask for output_format="raw"'):
            result.arrays  # noqa: B018


def test_raw_frames_are_read() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 16, 3), dtype=np.uint8)
    result = result_of(seed=np.array([1, 2], np.int64), raw_video=frames)
    assert (result.arrays == frames).all()
    assert (result.videos, result.images) == ([], [])
    video = result.outputs[1]
    assert isinstance(video, GeneratedVideo)
    assert (video.format, video.shape, video.data) == ("raw", (3, 8, 16, 3), frames[1].tobytes())
    with pytest.raises(ValueError, match="raw frames"):
        video.save("never")


def test_the_format_of_an_unknown_file_is_bin() -> None:
    assert [file_format(data) for data in (b"", b"RIFF....WAVE", b"text")] == ["bin"] * 3


def test_what_a_server_takes_is_read() -> None:
    request = build_families_request("families", None, timeout_s=None)
    (family,) = read_families(response(families=text(json.dumps(FAMILIES))), request)
    assert family == Family(
        family="wan",
        pipeline_class="WanPipeline",
        tasks=("text-to-video", "image-to-video"),
        parameters={
            "num_frames": Parameter(default=81, min=1, max=161, description="one more than a multiple of 4"),
            "output_format": Parameter(default="b64_mp4", choices=("b64_mp4", "mp4"), description="of the video"),
            "seed": Parameter(min=0),
        },
    )


@pytest.mark.parametrize("answer", [{}, {"families": text("?")}, {"families": text("[1]")}, {"families": text("[{}]")}])
def test_an_answer_that_does_not_say_what_a_server_takes_is_an_error_of_the_server(
    answer: dict[str, np.ndarray],
) -> None:
    with pytest.raises(ServerError, match="'families'"):
        read_families(response(**answer), build_families_request("families", None, timeout_s=None))


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
