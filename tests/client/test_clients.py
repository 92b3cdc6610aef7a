"""All four clients (blocking and asyncio, gRPC and HTTP) against a double of Triton on loopback: they behave alike."""

from __future__ import annotations

import asyncio
import base64
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.client.conftest import VIDEO_FILES, Caller, TritonDouble

from triton_diffusion_client import (
    AsyncDiffusionClient,
    DeadlineExceededError,
    DiffusionClient,
    DiffusionClientError,
    GenerationResult,
    InvalidRequestError,
    ModelNotFoundError,
    Preview,
    Progress,
    RequestCancelledError,
    RequestTimeoutError,
    ServerError,
    ServerUnavailableError,
)

ALL_OPTIONS = {
    "negative_prompt": "blur",
    "height": 64,
    "width": 128,
    "num_frames": 17,
    "fps": 12.5,
    "flow_shift": 8.0,
    "strength": 0.75,
    "num_inference_steps": 4,
    "guidance_scale": 3.5,
    "guidance_scale_2": 1.5,
    "embedded_guidance_scale": 2.5,
    "seed": 2**53 + 1,
    "num_images_per_prompt": 2,
    "max_sequence_length": 48,
    "output_quality": 90,
    "priority": 9,
    "deadline_s": 2.5,
    "deadline_action": "drop",
}


def unused_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_generate_returns_pictures_seeds_and_timings(caller: Caller) -> None:
    result = caller.generate("a red circle", num_images_per_prompt=2, seed=2**60, guidance_scale=2.0)
    assert [image.size for image in result.images] == [(16, 8), (16, 8)]
    assert [output.array[0, 0].tolist() for output in result.outputs] == [[0, 0, 0], [1, 1, 1]]
    assert all(data.startswith(b"\x89PNG") for data in result.data)
    assert result.seeds == [2**60, 2**60 + 1]
    assert result.timings.total_s == 1.5
    assert result.timings.queue_s == 0.25
    assert result.timings.stages_s == {"text_encoding": 0.25, "denoising": 1.0}
    assert result.timings.steps_s == (0.5, 0.5)
    assert result.warnings == ("guidance_scale has no effect",)


@pytest.mark.parametrize(
    ("output_format", "beginning"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")]
)
def test_generate_gives_the_format_asked_for(caller: Caller, output_format: str, beginning: bytes) -> None:
    output = caller.generate("x", output_format=output_format).outputs[0]
    assert output.format == output_format
    assert output.data.startswith(beginning)


def test_raw_pictures_come_as_pixels(caller: Caller) -> None:
    result = caller.generate("x", output_format="raw", num_images_per_prompt=2)
    assert result.arrays.shape == (2, 8, 16, 3)
    assert result.arrays.dtype == np.uint8
    assert result.arrays[1].max() == 1
    assert [image.size for image in result.images] == [(16, 8), (16, 8)]
    assert result.data[1] == b"\x01" * (8 * 16 * 3)


@pytest.mark.parametrize("output_format", [None, "mp4", "webm", "gif"])
def test_videos_come_as_files(caller: Caller, output_format: str | None) -> None:
    wan = {"model": "wan"}
    file = VIDEO_FILES[output_format or "mp4"]
    result = caller.generate("x", client=wan, output_format=output_format, num_images_per_prompt=2, seed=5)
    assert (result.videos, result.seeds, result.images) == ([file, file], [5, 6], [])
    *_, preview, streamed = caller.stream("x", client=wan, output_format=output_format, preview_interval=3)
    assert streamed.videos == [file]
    assert streamed.outputs[0].format == (output_format or "mp4")
    assert preview.images[0].size == (16, 8)


def test_raw_videos_come_as_frames(caller: Caller) -> None:
    result = caller.generate("x", client={"model": "wan"}, output_format="raw", num_images_per_prompt=2)
    assert result.arrays.shape == (2, 2, 8, 16, 3)
    assert result.arrays[1, :, 0, 0, 0].tolist() == [1, 101]


def test_pictures_reach_the_model_as_they_are(caller: Caller, triton: TritonDouble, tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 2), (9, 9, 9))
    picture.save(tmp_path / "a.webp")
    images = [tmp_path / "a.webp", picture, b"any bytes \x00\xff"]
    caller.generate("x", image=images)
    caller.stream("x", image=images)
    caller.generate("x", image=str(tmp_path / "a.webp"))
    for request in triton.received:
        datatype, shape, content = request.inputs["image"]
        if datatype is None:  # JSON
            content = [base64.b64decode(each, validate=True) for each in content]
        expected = [(tmp_path / "a.webp").read_bytes(), images[2]]
        assert shape == [len(content)]
        assert content[::2] == expected[: len(content[::2])]
        assert all(each.startswith(b"\x89PNG") for each in content[1:2])


def test_all_models_have_names_after_the_chain(caller: Caller, triton: TritonDouble) -> None:
    caller.generate("x", client={"model": "wan"})
    caller.stream("x", client={"model": "wan"})
    caller.cancel("r1", model="wan")
    caller.families(model="wan")
    assert [request.model for request in triton.received] == ["wan", "wan_stream", "wan_cancellation", "wan_families"]


def test_families_tells_what_the_server_takes(caller: Caller, triton: TritonDouble) -> None:
    headers = {"Authorization": "Bearer secret"}
    (family,) = caller.families(headers=headers, timeout_s=30)
    assert (family.family, family.tasks[0]) == ("wan", "text-to-video")
    assert family.parameters["num_frames"].max == 161
    assert caller.families("wan") == (family,)
    assert caller.families("flux") == ()
    assert [request.model for request in triton.received] == ["families"] * 3
    assert [request.value("name") for request in triton.received] == [None, "wan", "flux"]
    assert triton.received[0].headers["authorization"] == "Bearer secret"
    with pytest.raises(ModelNotFoundError, match="unknown model: 'sd_families'"):
        caller.families(model="sd")


def test_all_options_reach_the_model(caller: Caller, triton: TritonDouble) -> None:
    caller.generate("café \N{LARGE RED CIRCLE}", **ALL_OPTIONS)
    caller.stream("café \N{LARGE RED CIRCLE}", preview_interval=3, **ALL_OPTIONS)
    for request in triton.received:
        values = {name: value for name, (_, _, value) in request.inputs.items()}
        assert values["prompt"] == "café \N{LARGE RED CIRCLE}"
        assert values["num_outputs"] == 2
        for option in ALL_OPTIONS.keys() - {"num_images_per_prompt"}:
            assert values[option] == ALL_OPTIONS[option]
    assert triton.received[0].model == "diffusion"
    assert triton.received[1].model == "diffusion_stream"
    assert triton.received[1].value("preview_interval") == 3


def test_options_that_are_not_set_are_not_sent(caller: Caller, triton: TritonDouble) -> None:
    caller.generate("x", height=None)
    caller.stream("x", preview_interval=None)
    for request in triton.received:
        assert set(request.inputs) == {"prompt", "seed"}


def test_the_request_id_is_the_callers_or_a_new_one(caller: Caller, triton: TritonDouble) -> None:
    assert caller.generate("x", request_id="mine").request_id == "mine"
    first, second = caller.generate("x"), caller.generate("x")
    assert [request.id for request in triton.received] == ["mine", first.request_id, second.request_id]
    assert len({"", first.request_id, second.request_id}) == 3


def test_headers_go_with_every_request(caller: Caller, triton: TritonDouble) -> None:
    headers = {"Authorization": "Bearer secret"}
    caller.generate("x", client={"headers": headers})
    caller.stream("x", client={"headers": headers})
    assert [request.headers["authorization"] for request in triton.received] == ["Bearer secret"] * 2


def test_models_have_the_names_given_to_the_client(caller: Caller, triton: TritonDouble) -> None:
    names = {"model": "flux one", "stream_model": "flux/stream"}
    with pytest.raises(ModelNotFoundError, match="unknown model"):
        caller.generate("x", client=names)
    with pytest.raises(ModelNotFoundError, match="unknown model"):
        caller.stream("x", client=names)


def test_stream_yields_progress_of_each_step_and_then_the_result(caller: Caller) -> None:
    *progress, result = caller.stream("x", num_inference_steps=5, seed=11)
    assert [(event.stage, event.step, event.total) for event in progress] == [
        ("denoising", step, 5) for step in range(1, 6)
    ]
    assert progress[0].remaining_s is None
    assert progress[1].remaining_s == pytest.approx(0.15)
    assert isinstance(result, GenerationResult)
    assert result.seeds == [11]
    assert result.images[0].size == (16, 8)


def test_stream_yields_previews_when_asked(caller: Caller) -> None:
    events = caller.stream("x", num_inference_steps=4, preview_interval=2, num_images_per_prompt=2)
    kinds = [type(event) for event in events]
    assert kinds == [Progress, Progress, Preview, Progress, Progress, Preview, GenerationResult]
    preview = events[2]
    assert (preview.step, preview.total) == (2, 4)
    assert [image.size for image in preview.images] == [(16, 8), (16, 8)]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("invalid", InvalidRequestError),
        ("too much", ServerUnavailableError),
        ("crash", ServerError),
        ("taken back", RequestCancelledError),
        ("late", RequestTimeoutError),
        ("too late", DeadlineExceededError),
        ("taken back too late", DeadlineExceededError),
    ],
)
def test_an_error_of_generate_has_its_type_and_the_servers_message(
    caller: Caller, prompt: str, error: type[DiffusionClientError]
) -> None:
    messages = {
        "invalid": "height=7 is not a multiple of 16; use 0 or 16",
        "too much": "the queue is full; come back later",
        "crash": "the worker group died",
        "taken back": "cancelled in denoising after 3 steps",
        "late": "the time-out of 3 s is over",
        "too late": "DEADLINE_EXCEEDED: deadline_s=3 cannot be met; try again later",
        "taken back too late": "DEADLINE_EXCEEDED: deadline_s=3 is over; cancelled after 3 steps",
    }
    with pytest.raises(error) as caught:
        caller.generate(prompt, request_id="r1")
    assert type(caught.value) is error
    assert str(caught.value) == caught.value.message == messages[prompt]
    assert caught.value.request_id == "r1"


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("invalid", InvalidRequestError),
        ("too much", ServerUnavailableError),
        ("taken back", RequestCancelledError),
        ("midway", ServerError),
        ("too late", DeadlineExceededError),
        ("taken back too late", DeadlineExceededError),
        ("midway too late", DeadlineExceededError),
    ],
)
def test_an_error_of_a_stream_has_its_type(caller: Caller, prompt: str, error: type[DiffusionClientError]) -> None:
    with pytest.raises(error) as caught:
        caller.stream(prompt)
    assert type(caught.value) is error


def test_a_stream_without_a_result_is_an_error(caller: Caller) -> None:
    with pytest.raises(ServerError, match="without a result"):
        caller.stream("nothing")
    with pytest.raises(ServerError, match="without a result"):
        caller.generate("nothing")


def test_the_time_out_ends_generate_and_goes_with_the_request(caller: Caller, triton: TritonDouble) -> None:
    started_s = time.monotonic()
    with pytest.raises(RequestTimeoutError, match=r"timeout_s=0\.3"):
        caller.generate("slow", num_inference_steps=100, timeout_s=0.3)
    assert time.monotonic() - started_s < 2
    assert triton.received[0].parameters["timeout"] == 300_000


def test_the_time_out_covers_a_whole_stream_not_each_event(caller: Caller, triton: TritonDouble) -> None:
    started_s = time.monotonic()
    with pytest.raises(RequestTimeoutError):
        caller.stream("slow", num_inference_steps=100, timeout_s=0.3)
    assert time.monotonic() - started_s < 2
    assert triton.received[0].cancelled.wait(2)


def test_a_request_may_wait_longer_than_its_client(caller: Caller) -> None:
    client = {"timeout_s": 0.05}
    with pytest.raises(RequestTimeoutError):
        caller.generate("slow", client=client)
    assert caller.generate("slow", client=client, timeout_s=30).seeds == [7]
    assert caller.generate("slow", client=client, timeout_s=math.inf).seeds == [7]


def test_closing_a_stream_cancels_the_request(caller: Caller, triton: TritonDouble) -> None:
    caller.close_stream_after(2, "slow", num_inference_steps=100)
    assert triton.received[0].cancelled.is_set()


def test_each_client_has_a_scope_of_its_own_unless_it_is_given_one(caller: Caller, triton: TritonDouble) -> None:
    caller.generate("x")
    caller.stream("x")
    caller.cancel("r1")
    scopes = [request.parameters["cancel_scope"] for request in triton.received]
    assert len(set(scopes)) == 3
    assert all(len(scope) == 32 for scope in scopes), "too short to be guessed"
    triton.received.clear()
    shared = {"cancel_scope": "team"}
    caller.generate("x", client=shared)
    caller.stream("x", client=shared)
    caller.cancel("r1", **shared)
    assert [request.parameters["cancel_scope"] for request in triton.received] == ["team"] * 3


def test_a_client_with_an_empty_scope_names_none(caller: Caller, triton: TritonDouble) -> None:
    caller.generate("x", client={"cancel_scope": ""})
    caller.cancel("r1", cancel_scope="")
    assert [request.parameters.get("cancel_scope") for request in triton.received] == [None, None]


def test_cancel_asks_the_model_that_cancels_for_the_id(caller: Caller, triton: TritonDouble) -> None:
    headers = {"Authorization": "Bearer secret"}
    assert caller.cancel("r1", cancel_scope="team", timeout_s=30, headers=headers) is False
    request = triton.received[0]
    assert request.model == "cancellation"
    assert request.inputs == {"request_id": ("BYTES", [1], "r1")}
    assert (request.parameters["cancel_scope"], request.parameters["timeout"]) == ("team", 30_000_000)
    assert request.headers["authorization"] == "Bearer secret"


def test_cancel_is_of_the_model_given_to_the_client(caller: Caller, triton: TritonDouble) -> None:
    with pytest.raises(ModelNotFoundError, match="unknown model: 'stopping'"):
        caller.cancel("r1", cancellation_model="stopping")


def test_cancel_reports_an_unreachable_server(caller: Caller) -> None:
    caller.url = unused_address()
    with pytest.raises(ServerUnavailableError, match="cannot reach"):
        caller.cancel("r1")


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_only_the_same_scope_cancels_and_the_request_raises_where_it_is_waited_for(
    caller: Caller, triton: TritonDouble, call: str
) -> None:
    shared = {"cancel_scope": "team"}
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(getattr(caller, call), "slow", client=shared, num_inference_steps=200, request_id="r1")
        wait_for_requests(triton, 1)
        assert not caller.cancel("r1")
        assert not caller.cancel("r1", cancel_scope="others")
        assert not caller.cancel("r2", **shared)
        assert not waiting.done()
        assert caller.cancel("r1", **shared)
        with pytest.raises(RequestCancelledError, match="cancelled in denoising") as caught:
            waiting.result(5)
        assert caught.value.request_id == "r1"
        assert not caller.cancel("r1", **shared), "it is over"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_cancels_its_own_request(triton: TritonDouble, protocol: Any) -> None:
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    with DiffusionClient(url, protocol) as client, ThreadPoolExecutor() as threads:
        waiting = threads.submit(client.generate, "slow", num_inference_steps=200, request_id="r1")
        wait_for_requests(triton, 1)
        assert client.cancel("r1")
        with pytest.raises(RequestCancelledError):
            waiting.result(5)

    async def run() -> None:
        async with AsyncDiffusionClient(url, protocol) as client:
            waiting = asyncio.create_task(client.generate("slow", num_inference_steps=200, request_id="r2"))
            await asyncio.to_thread(wait_for_requests, triton, 3)
            assert await client.cancel("r2")
            with pytest.raises(RequestCancelledError):
                await waiting

    asyncio.run(run())


def wait_for_requests(triton: TritonDouble, number: int) -> None:
    deadline_s = time.monotonic() + 10
    while len(triton.received) < number and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert len(triton.received) == number


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_cancelling_the_task_cancels_the_request(triton: TritonDouble, protocol: Any) -> None:
    async def run() -> None:
        url = triton.grpc_url if protocol == "grpc" else triton.http_url
        async with AsyncDiffusionClient(url, protocol) as client:

            async def read() -> None:
                async for _ in client.stream("slow", num_inference_steps=100):
                    pass

            tasks = [asyncio.create_task(read())]
            if protocol == "grpc":
                tasks.append(asyncio.create_task(client.generate("slow", num_inference_steps=100)))
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()
            for task in tasks:
                with pytest.raises(asyncio.CancelledError):
                    await task
            for request in triton.received:
                assert await asyncio.to_thread(request.cancelled.wait, 2)
            assert len(triton.received) == len(tasks)

    asyncio.run(run())


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("call", ["client.generate", "list(client.stream"])
def test_ctrl_c_cancels_the_request(triton: TritonDouble, call: str) -> None:
    script = f"""
        from triton_diffusion_client import DiffusionClient
        client = DiffusionClient({triton.grpc_url!r})
        try:
            {call}("slow", num_inference_steps=1000){")" if "list" in call else ""}
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            input()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=with_client_on_path(),
        text=True,
    )
    assert process.stdout is not None
    try:
        deadline_s = time.monotonic() + 30
        while not triton.received and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert triton.received[0].cancelled.wait(2), "the process still lives, so only the client can have cancelled"
    finally:
        process.kill()
        process.communicate()


def with_client_on_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_an_unreachable_server_is_reported_at_once_with_its_address(caller: Caller) -> None:
    caller.url = unused_address()
    for call in (caller.generate, caller.stream):
        started_s = time.monotonic()
        with pytest.raises(ServerUnavailableError, match="triton-diffusion serve") as caught:
            call("x")
        assert time.monotonic() - started_s < 3
        assert caller.url in str(caught.value)


def test_a_server_that_dies_is_reported(caller: Caller, triton: TritonDouble) -> None:
    threading.Timer(0.5, triton.die).start()
    started_s = time.monotonic()
    with pytest.raises(DiffusionClientError):
        caller.stream("slow", num_inference_steps=100)
    assert time.monotonic() - started_s < 3


def test_a_server_of_another_protocol_is_reported(caller: Caller, triton: TritonDouble) -> None:
    caller.url = triton.http_url if caller.protocol == "grpc" else triton.grpc_url
    with pytest.raises(ServerUnavailableError, match=caller.url):
        caller.generate("x", timeout_s=5)


def test_is_ready_tells_whether_server_and_model_are(caller: Caller, triton: TritonDouble) -> None:
    assert caller.is_ready()
    assert not caller.is_ready(model="another")
    triton.is_ready = False
    assert not caller.is_ready()
    caller.url = unused_address()
    assert not caller.is_ready()


def test_wait_until_ready_returns_when_the_server_is_ready(caller: Caller, triton: TritonDouble) -> None:
    triton.is_ready = False
    threading.Timer(0.5, lambda: setattr(triton, "is_ready", True)).start()
    started_s = time.monotonic()
    caller.wait_until_ready(10)
    assert 0.4 < time.monotonic() - started_s < 3


def test_wait_until_ready_gives_up_and_says_why(caller: Caller, triton: TritonDouble) -> None:
    triton.is_ready = False
    with pytest.raises(ServerUnavailableError, match=r"not ready within 0\.5 s"):
        caller.wait_until_ready(0.5)
    caller.url = unused_address()
    with pytest.raises(ServerUnavailableError, match="cannot reach"):
        caller.wait_until_ready(0.5)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_one_client_serves_many_threads(triton: TritonDouble, protocol: Any) -> None:
    with DiffusionClient(triton.grpc_url if protocol == "grpc" else triton.http_url, protocol) as client:

        def ask(number: int) -> int:
            if number % 2:
                return client.generate("slow", seed=number).seeds[0]
            *_, result = client.stream("slow", seed=number)
            assert isinstance(result, GenerationResult)
            return result.seeds[0]

        started_s = time.monotonic()
        with ThreadPoolExecutor(12) as threads:
            assert list(threads.map(ask, range(24))) == list(range(24))
        assert time.monotonic() - started_s < 24 * 3 * 0.05, "the requests waited for one another"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_many_tasks_share_a_client(triton: TritonDouble, protocol: Any) -> None:
    async def run() -> list[GenerationResult]:
        async with AsyncDiffusionClient(triton.grpc_url if protocol == "grpc" else triton.http_url, protocol) as client:
            return await asyncio.gather(*(client.generate("slow", seed=number) for number in range(12)))

    started_s = time.monotonic()
    assert [result.seeds[0] for result in asyncio.run(run())] == list(range(12))
    assert time.monotonic() - started_s < 12 * 3 * 0.05, "the requests waited for one another"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_encrypted_server_is_reached_and_its_certificate_checked(tmp_path: Path, protocol: Any) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    double = TritonDouble(key, certificate)
    url = double.grpc_url if protocol == "grpc" else double.http_url
    try:
        for is_async in (False, True):
            caller = Caller(is_async, protocol, url)
            trusting = {"ssl": True, "root_certificates": certificate}
            assert caller.generate("x", client=trusting).seeds == [7]
            assert len(caller.stream("x", client=trusting)) == 4
            for client in ({"ssl": True}, {}):
                with pytest.raises(ServerUnavailableError, match="cannot reach"):
                    caller.generate("x", client=client, timeout_s=10)
    finally:
        double.stop()


def test_a_closed_client_refuses_requests(triton: TritonDouble) -> None:
    client = DiffusionClient(triton.grpc_url)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("x")
    with pytest.raises(RuntimeError, match="closed"):
        client.cancel("r1")
    with pytest.raises(RuntimeError, match="closed"):
        client.families()


def test_only_text_formats_stream_over_http(triton: TritonDouble) -> None:
    with DiffusionClient(triton.http_url, "http") as client, pytest.raises(ValueError, match="protocol='grpc'"):
        client.stream("x", output_format="raw")
    assert triton.received == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "ftp"}, "'grpc' or 'http'"),
        ({"url": "http://localhost:8000"}, "protocol='http'"),
        ({"url": "grpc://localhost:8001", "protocol": "http"}, "protocol='grpc'"),
        ({"url": "localhost:port", "protocol": "http"}, "host:port"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"cancel_scope": "\ud800"}, "cancel_scope has a lone surrogate"),
        ({"private_key": "key.pem"}, "belong together"),
    ],
)
def test_wrong_arguments_of_a_client_are_refused(arguments: dict[str, Any], message: str) -> None:
    for client in (DiffusionClient, AsyncDiffusionClient):
        with pytest.raises(ValueError, match=message):
            client(**arguments)


def test_each_protocol_has_its_default_port() -> None:
    assert "127.0.0.1:8001" in repr(DiffusionClient())
    assert "127.0.0.1:8000" in repr(DiffusionClient(protocol="http"))
    assert "'gpu:80'" in repr(DiffusionClient("https://gpu:80/", "http"))
