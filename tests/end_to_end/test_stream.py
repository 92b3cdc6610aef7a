"""diffusion_stream: a message a step, previews, the result, and what happens when the caller goes away."""

from __future__ import annotations

import io
import json
import queue
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tests.end_to_end.conftest import RunningServer, tensor
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.end_to_end

PROMPT = "a large red circle"


@contextmanager
def stream(server: RunningServer, **inputs: Any) -> Iterator[Iterator[Any]]:
    """The responses of a streamed request; leaving early cancels it."""
    responses: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> Iterator[Any]:
        while True:
            result, error = responses.get(timeout=60)
            if error is not None:
                raise error
            yield result
            if result.as_numpy("generated_image") is not None or result.as_numpy("raw_image") is not None:
                return

    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        tensors = [tensor(tritonclient.grpc, name, value) for name, value in inputs.items()]
        client.async_stream_infer("diffusion_stream", tensors)
        try:
            yield read()
        finally:
            client.stop_stream(cancel_requests=True)


def progress_of(response: Any) -> dict[str, Any] | None:
    value = response.as_numpy("progress")
    return None if value is None else json.loads(value[0])


def advancing(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that a slow moment puts in between, which say again what was said."""
    told = {message["step"]: message for message in reversed(list(messages))}
    return [told[step] for step in sorted(told) if step]


def test_there_is_a_message_for_every_step_and_then_the_picture(server: RunningServer) -> None:
    with stream(server, prompt=PROMPT, seed=2, num_inference_steps=6, output_format="raw") as responses:
        *messages, result = responses
    steps = advancing(progress_of(message) for message in messages)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step["total"] == 6 and step["elapsed_s"] > 0 for step in steps)
    assert steps[-1]["remaining_s"] == 0
    alone = server.infer(prompt=PROMPT, seed=2, num_inference_steps=6, output_format="raw")
    assert np.array_equal(result.as_numpy("raw_image"), alone.as_numpy("raw_image"))
    assert result.as_numpy("seed").tolist() == [2]


def test_previews_come_every_k_steps_and_get_closer_to_the_picture(server: RunningServer) -> None:
    with stream(
        server, prompt=PROMPT, seed=2, num_inference_steps=12, preview_interval=4, output_format="png"
    ) as responses:
        *messages, result = responses
    previews = {
        progress_of(message)["step"]: _pixels(message.as_numpy("preview_image")[0])
        for message in messages
        if message.as_numpy("preview_image") is not None
    }
    assert sorted(previews) == [4, 8]
    final = _pixels(result.as_numpy("generated_image")[0])
    assert 0 < np.abs(previews[8] - final).mean() < np.abs(previews[4] - final).mean()


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_a_stream_that_is_closed_frees_the_ranks_before_the_request_would_have_ended(server: RunningServer) -> None:
    with stream(server, prompt=PROMPT, num_inference_steps=200, height=256, width=256) as responses:
        next(responses)
    log = server.process.log_tail
    deadline = time.monotonic() + 10
    while "cancelled in denoising after" not in log(30):
        assert time.monotonic() < deadline, "the denoising stage did not hear of the cancel"
        time.sleep(0.05)


def test_a_unary_request_that_times_out_on_the_client_is_cancelled_on_the_server(server: RunningServer) -> None:
    inputs = [
        tensor(tritonclient.grpc, "prompt", PROMPT),
        tensor(tritonclient.grpc, "num_inference_steps", 199),
        tensor(tritonclient.grpc, "height", 256),
        tensor(tritonclient.grpc, "width", 256),
    ]
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="Deadline Exceeded"),
    ):
        client.infer("diffusion", inputs, client_timeout=0.5)
    deadline = time.monotonic() + 10
    while "of 199 steps" not in server.process.log_tail(30):
        assert time.monotonic() < deadline, "the denoising stage did not hear of the cancel"
        time.sleep(0.05)


def test_the_timeout_of_a_request_ends_it_on_the_server_over_http_too(server: RunningServer) -> None:
    inputs = [tensor(tritonclient.http, "prompt", PROMPT), tensor(tritonclient.http, "num_inference_steps", 198)]
    with (
        tritonclient.http.InferenceServerClient(server.http_url, network_timeout=60) as client,
        pytest.raises(
            InferenceServerException, match=r"its timeout of 0\.3 s is over: cancelled (in|before) denoising"
        ),
    ):
        client.infer("diffusion", inputs, timeout=300_000)


def test_a_bad_request_on_the_stream_ends_with_its_error_alone(server: RunningServer) -> None:
    with (
        pytest.raises(InferenceServerException, match="prompt is empty"),
        stream(server, prompt=" ") as responses,
    ):
        list(responses)


def test_generate_stream_sends_an_event_a_step_over_http(server: RunningServer) -> None:
    body = json.dumps({"prompt": PROMPT, "seed": 1, "num_inference_steps": 3}).encode()
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/diffusion_stream/generate_stream", data=body)
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = [line.decode() for line in response]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [step["step"] for step in advancing(json.loads(event["progress"]) for event in events[:-1])] == [1, 2, 3]
    assert events[-1]["generated_image"]


def test_a_stream_whose_request_waits_says_so_every_second(server: RunningServer) -> None:
    """Something must be sent now and then: only so does Triton notice that a caller over HTTP went away."""
    (rank,) = server.ranks("text_encoding")
    rank.suspend()
    try:
        with stream(server, prompt=PROMPT, num_inference_steps=2) as responses:
            messages = [progress_of(next(responses)) for _ in range(2)]
    finally:
        rank.resume()
    assert [(message["step"], message["total"]) for message in messages] == [(0, 2), (0, 2)]
