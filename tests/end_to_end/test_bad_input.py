"""Wrong requests: each is answered with what was given, what is allowed and what to do; the next good one is served."""

from __future__ import annotations

import json
import struct
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tests.end_to_end.conftest import RunningServer, tensor
from tritonclient.utils import InferenceServerException

from triton_diffusion.stage_key import PARAMETER, key_of_server
from triton_diffusion.state import CancelOrder, ProgressQuery, write_cancel_order, write_progress_query

pytestmark = pytest.mark.end_to_end

INT32_MAX = 2**31 - 1
BAD_INPUTS = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n\t"}, "prompt is empty"),
    ({"prompt": "x" * 20_000}, "has 20000 bytes; this server allows 16384"),
    ({"prompt": b"\xff\xfe"}, "not UTF-8"),
    ({"height": 100}, "height=100 must be a positive multiple of 16 for this model; try 96 or 112"),
    ({"width": 0}, "width=0 must be a positive multiple of 16"),
    ({"width": -128}, "width=-128 must be a positive multiple of 16"),
    ({"height": 16384, "width": 16384}, "this server allows 4194304"),
    ({"height": INT32_MAX - 15}, "must be at most 65536"),
    ({"height": 16, "width": 131072}, "width=131072 must be at most 65536"),
    ({"num_inference_steps": 0}, "num_inference_steps=0 must be between 1 and 200"),
    ({"num_inference_steps": 201}, "num_inference_steps=201 must be between 1 and 200"),
    ({"guidance_scale": -1.0}, "guidance_scale=-1.0 must be a finite number"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
    ({"embedded_guidance_scale": float("inf")}, "embedded_guidance_scale=inf must be a finite number"),
    ({"seed": -1}, "seed=-1 must be between 0 and"),
    ({"seed": 2**63 - 1, "num_outputs": 2}, "leave it out for a random one"),
    ({"num_outputs": 0}, "num_outputs=0 must be between 1 and 8"),
    ({"num_outputs": 9}, "num_outputs=9 must be between 1 and 8"),
    ({"max_sequence_length": 513}, "max_sequence_length=513 must be between 1 and 512"),
    (
        {"output_format": "pgn"},
        "output_format='pgn' must be one of b64_png, b64_jpeg, b64_webp, png, jpeg, webp, raw .did you mean png",
    ),
    ({"output_format": "jpeg", "output_quality": 101}, "output_quality=101 must be between 1 and 100"),
    ({"priority": 10}, "priority=10 must be between 0 and 9"),
    ({"deadline_s": 0.0}, r"deadline_s=0\.0 must be above 0"),
    ({"deadline_s": float("nan")}, "deadline_s=nan must be above 0"),
    ({"deadline_s": 9.0, "deadline_action": "stop"}, "deadline_action='stop' must be one of refuse, drop, continue"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS, ids=[str(number) for number in range(len(BAD_INPUTS))])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_value_that_is_not_allowed_is_refused_with_the_reason(
    server: RunningServer, inputs: dict[str, Any], message: str, protocol: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        server.infer(protocol=protocol, **{"prompt": "a circle"} | inputs)
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": np.array([b"a", b"b"], dtype=np.object_)},
        {"prompt": np.array([[b"a"]], dtype=np.object_)},
        {"seed": np.array([1], dtype=np.int32)},
        {"height": np.array([128.0], dtype=np.float32)},
        {"hieght": np.array([128], dtype=np.int32)},
    ],
    ids=["two prompts", "2-D prompt", "int32 seed", "float height", "unknown input"],
)
def test_a_wrong_dtype_shape_or_name_is_refused(server: RunningServer, wrong: dict[str, Any], protocol: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        server.infer(protocol=protocol, **{"prompt": "a circle"} | wrong)
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")


def test_a_request_without_a_prompt_is_refused(server: RunningServer) -> None:
    with pytest.raises(InferenceServerException, match="prompt"):
        server.infer(seed=1)


def test_generate_answers_bad_values_with_http_400_and_the_message(server: RunningServer) -> None:
    body = json.dumps({"prompt": "a circle", "num_inference_steps": 0}).encode()
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/diffusion/generate", data=body)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 400
    assert "must be between 1 and 200" in json.load(caught.value)["error"]


@pytest.mark.parametrize("stage_model", ["text_encoding", "denoising", "decoding"])
def test_garbage_sent_to_a_stage_model_is_refused(server: RunningServer, stage_model: str) -> None:
    key = {PARAMETER: key_of_server(server.process.pid)}
    metadata = json.dumps({"__metadata__": {"state": '{"request_id": "x", "request": {}}'}}).encode()
    for blob in (b"", b"garbage", struct.pack("<Q", 2**63), struct.pack("<Q", len(metadata)) + metadata, b"\x80\x04."):
        with pytest.raises(InferenceServerException, match="state") as caught:
            server.infer(model=stage_model, parameters=key, state=np.frombuffer(blob, np.uint8))
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("parameters", [{}, {"stage_key": ""}, {"stage_key": "0" * 64}, {"stage_key": 7}])
def test_a_client_cannot_call_a_stage_past_the_chain(
    server: RunningServer, parameters: dict[str, Any], protocol: str
) -> None:
    """Whoever could, might cancel others' requests, see their previews, and ask for more than the limits."""
    for order in (write_cancel_order(CancelOrder(["any"])), write_progress_query(ProgressQuery("any", 0))):
        state = np.frombuffer(order, np.uint8)
        with pytest.raises(InferenceServerException, match="taken from the models of this server only") as caught:
            server.infer(model="denoising", protocol=protocol, parameters=parameters, state=state)
        assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")


def test_tensors_that_lie_about_their_size_are_refused(server: RunningServer) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        prompt = tensor(tritonclient.grpc, "prompt", "a circle")
        prompt._raw_content = struct.pack("<I", 2**31) + b"a circle"
        with pytest.raises(InferenceServerException):
            client.infer("diffusion", [prompt])
    assert server.infer(prompt="a circle", num_inference_steps=1) is not None


def test_pictures_are_counted_before_they_are_decoded(server: RunningServer) -> None:
    """Otherwise a request could have us decode any number of them, each of the largest size."""
    with pytest.raises(InferenceServerException, match="image: 3 given, and this model takes 0 to 1"):
        server.infer(prompt="a cat", image=np.array([b"no picture"] * 3, dtype=np.object_))
    with pytest.raises(InferenceServerException, match=r"image\[0\]"):
        server.infer(prompt="a cat", image=np.array([b"no picture"], dtype=np.object_))
