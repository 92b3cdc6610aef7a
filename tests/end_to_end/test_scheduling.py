"""Many requests at a time: who goes first, who is refused, who can take a request back, and what a batch changes."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from tests.end_to_end.conftest import STAGES, RunningServer, own_server, tensor
from tritonclient.utils import InferenceServerException

from triton_diffusion_client import (
    AsyncDiffusionClient,
    DeadlineExceededError,
    DiffusionClient,
    Progress,
    RequestCancelledError,
    RequestTimeoutError,
    ServerUnavailableError,
)

pytestmark = pytest.mark.end_to_end

PROMPT = "a large red circle"


@contextmanager
def suspended(server: RunningServer, stage_model: str) -> Iterator[None]:
    """A stage whose ranks stand still: what comes to it stays in it."""
    ranks = server.ranks(stage_model)
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()


def wait_until_in(server: RunningServer, stage_model: str, count: int = 1) -> None:
    deadline_s = time.monotonic() + 20
    while server.metric("queue_depth", stage_model) + server.metric("running_requests", stage_model) < count:
        assert time.monotonic() < deadline_s, f"no request has come to {stage_model}"
        time.sleep(0.05)


# Cancels. Each way to take a request back is tried while the request is in each of the stages.


def cancel_grpc_call(server: RunningServer, in_stage: Callable[[], None]) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        inputs = [tensor(tritonclient.grpc, "prompt", PROMPT), tensor(tritonclient.grpc, "num_inference_steps", 2)]
        ended: Future[Any] = Future()
        call = client.async_infer("diffusion", inputs, lambda result, error: ended.set_result(error))
        in_stage()
        call.cancel()
        assert "cancelled" in str(ended.result(20)).lower()


def close_grpc_stream(server: RunningServer, in_stage: Callable[[], None]) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: None)
        inputs = [tensor(tritonclient.grpc, "prompt", PROMPT), tensor(tritonclient.grpc, "num_inference_steps", 2)]
        client.async_stream_infer("diffusion_stream", inputs)
        in_stage()
        client.stop_stream(cancel_requests=True)


def disconnect_http_stream(server: RunningServer, in_stage: Callable[[], None]) -> None:
    connection = http.client.HTTPConnection(server.http_url)
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 2})
    connection.request("POST", "/v2/models/diffusion_stream/generate_stream", body)
    in_stage()
    assert connection.sock is not None
    connection.sock.close()
    connection.close()


def time_out_on_the_client(server: RunningServer, in_stage: Callable[[], None]) -> None:
    with DiffusionClient(server.grpc_url) as client, pytest.raises(RequestTimeoutError):
        client.generate(PROMPT, num_inference_steps=2, timeout_s=1.0)


def cancel_by_id_over_grpc(server: RunningServer, in_stage: Callable[[], None]) -> None:
    cancel_by_id(DiffusionClient(server.grpc_url), in_stage)


def cancel_by_id_over_http(server: RunningServer, in_stage: Callable[[], None]) -> None:
    cancel_by_id(DiffusionClient(server.http_url, "http"), in_stage)


def cancel_by_id(client: DiffusionClient, in_stage: Callable[[], None]) -> None:
    with client, ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.generate, PROMPT, num_inference_steps=2, request_id="mine")
        in_stage()
        assert client.cancel("mine")
        with pytest.raises(RequestCancelledError, match="by its request id: cancelled in"):
            future.result(20)


@pytest.mark.parametrize("stage_model", STAGES)
@pytest.mark.parametrize(
    "cancel",
    [
        cancel_grpc_call,
        close_grpc_stream,
        disconnect_http_stream,
        time_out_on_the_client,
        cancel_by_id_over_grpc,
        cancel_by_id_over_http,
    ],
)
def test_a_request_can_be_taken_back_in_every_stage(
    server: RunningServer, stage_model: str, cancel: Callable[[RunningServer, Callable[[], None]], None]
) -> None:
    # The request of the test before may still be on the page.
    server.wait_until_idle()
    cancelled = server.metric("requests_cancelled_total", stage_model)
    with suspended(server, stage_model):
        cancel(server, lambda: wait_until_in(server, stage_model))
        # While the ranks stand still: it is the stage that lets the request go, not their next answer.
        server.wait_until_idle()
    server.wait_for_metric("requests_cancelled_total", stage_model, cancelled + 1)
    assert server.infer(prompt=PROMPT, num_inference_steps=1) is not None


def test_a_cancelled_request_runs_one_more_step_at_most(server: RunningServer) -> None:
    with DiffusionClient(server.grpc_url) as client, ThreadPoolExecutor(1) as pool:
        steps: list[int] = []

        def watch() -> None:
            options: Any = {"num_inference_steps": 150, "height": 256, "width": 256, "request_id": "watched"}
            steps.extend(event.step for event in client.stream(PROMPT, **options) if isinstance(event, Progress))

        future = pool.submit(watch)
        while len(steps) < 5:
            time.sleep(0.001)
        at_cancel = steps[-1]
        assert client.cancel("watched")
        with pytest.raises(RequestCancelledError, match=r"cancelled in denoising after (\d+) steps") as caught:
            future.result(20)
    done = int(str(caught.value).rsplit(" ", 2)[1])
    # What was told is a step or two behind what is done.
    assert done <= at_cancel + 4
    assert server.metric("running_requests", "denoising") in (0, 1)
    server.wait_until_idle()


def test_nobody_cancels_the_request_of_another(server: RunningServer) -> None:
    with (
        DiffusionClient(server.grpc_url) as owner,
        DiffusionClient(server.grpc_url) as other,
        DiffusionClient(server.grpc_url, cancel_scope="") as nobody,
        ThreadPoolExecutor(1) as pool,
    ):
        with suspended(server, "denoising"):
            future = pool.submit(owner.generate, PROMPT, num_inference_steps=2, request_id="shared-name")
            wait_until_in(server, "denoising")
            assert not other.cancel("shared-name")
            assert not nobody.cancel("shared-name")
        assert future.result(60).images


def test_a_cancel_without_an_id_or_of_one_that_is_not_here_is_answered(server: RunningServer) -> None:
    assert not server.infer(model="cancellation", request_id="unheard-of").as_numpy("cancelled").item()
    with pytest.raises(InferenceServerException, match="request_id is empty"):
        server.infer(model="cancellation", request_id="")


def test_a_cancel_over_plain_http_needs_no_client(server: RunningServer) -> None:
    connection = http.client.HTTPConnection(server.http_url)
    with (
        suspended(server, "denoising"),
        ThreadPoolExecutor(1) as pool,
        tritonclient.http.InferenceServerClient(server.http_url) as client,
    ):
        inputs = [tensor(tritonclient.http, "prompt", PROMPT)]
        future = pool.submit(
            client.infer, "diffusion", inputs, request_id="curl-1", parameters={"cancel_scope": "a secret"}
        )
        wait_until_in(server, "denoising")
        body = json.dumps({"request_id": "curl-1", "cancel_scope": "a secret"})
        connection.request("POST", "/v2/models/cancellation/generate", body)
        answer = json.loads(connection.getresponse().read())
        assert answer["cancelled"] is True
        assert "cancelled" in str(future.exception(20))
    connection.close()


# What a batch changes: nothing.


def test_a_picture_does_not_depend_on_who_shared_its_batch(server: RunningServer) -> None:
    """In float32 within 1 of 255: the size of a batch changes the order of sums, and so the last bits."""
    requests: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": 1, "num_inference_steps": 20},
        {"prompt": "a blue star", "seed": 2, "num_inference_steps": 6, "priority": 9},
        {"prompt": "a green square", "seed": 3, "num_inference_steps": 31, "priority": 0},
        {"prompt": PROMPT, "seed": 4, "num_inference_steps": 12, "guidance_scale": 3.0, "negative_prompt": "blue"},
        {"prompt": "a yellow triangle", "seed": 5, "num_inference_steps": 9, "num_outputs": 3},
        {"prompt": PROMPT, "seed": 6, "num_inference_steps": 10, "height": 64, "width": 192},
        {"prompt": PROMPT, "seed": 7, "num_inference_steps": 15, "embedded_guidance_scale": 1.0},
    ]
    alone = [server.infer(output_format="raw", **each).as_numpy("raw_image") for each in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda each: server.infer(output_format="raw", **each), requests))
    differences = [np.abs(a.astype(int) - b.as_numpy("raw_image")).max() for a, b in zip(alone, together, strict=True)]
    print("largest differences of a pixel:", differences)
    assert max(differences) <= 1


def test_200_requests_of_mixed_sizes_at_once_are_all_drawn(server: RunningServer) -> None:
    sizes = [(64, 64), (128, 128), (64, 192), (128, 64)]

    async def ask(client: AsyncDiffusionClient, number: int) -> tuple[int, tuple[int, int]]:
        height, width = sizes[number % len(sizes)]
        result = await client.generate(
            f"a red circle {number}",
            seed=number,
            height=height,
            width=width,
            num_inference_steps=1 + number % 5,
            num_images_per_prompt=1 + number % 2,
            guidance_scale=2.0 if number % 3 == 0 else None,
            priority=number % 10,
        )
        assert len(result.images) == 1 + number % 2
        return result.seeds[0], result.images[0].size[::-1]

    async def ask_all() -> list[tuple[int, tuple[int, int]]]:
        async with AsyncDiffusionClient(server.grpc_url) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(200)))

    assert asyncio.run(ask_all()) == [(number, sizes[number % len(sizes)]) for number in range(200)]
    server.wait_until_idle()


# Who goes first.


def test_a_short_request_overtakes_long_ones_and_a_high_priority_all_others(tmp_path: Path) -> None:
    # One row at a time, so that there is an order.
    with own_server(tmp_path, {"denoising.max_batch_tokens": "1"}) as server:
        ended: list[str] = []
        lock = threading.Lock()

        def ask(client: DiffusionClient, name: str, **options: Any) -> None:
            client.generate(PROMPT, **options)
            with lock:
                ended.append(name)

        with DiffusionClient(server.grpc_url) as client, ThreadPoolExecutor(6) as pool:
            # All are there before the first step.
            with suspended(server, "denoising"):
                futures = [
                    pool.submit(ask, client, "low", num_inference_steps=8, priority=1),
                    pool.submit(ask, client, "long-1", num_inference_steps=40),
                    pool.submit(ask, client, "long-2", num_inference_steps=40, height=64, width=64),
                    pool.submit(ask, client, "short", num_inference_steps=4),
                    pool.submit(ask, client, "high", num_inference_steps=20, priority=9),
                ]
                wait_until_in(server, "denoising", 5)
            for future in futures:
                future.result(60)
        assert ended[0] == "high"
        assert ended.index("short") < min(ended.index("long-1"), ended.index("long-2"))
        assert ended[-1] == "low"


# Deadlines.


def test_a_deadline_that_cannot_be_met_is_refused_with_the_estimate(server: RunningServer) -> None:
    refused = server.metric("deadlines_exceeded_total", "denoising")
    for url, protocol in ((server.grpc_url, "grpc"), (server.http_url, "http")):
        with (
            DiffusionClient(url, protocol) as client,  # type: ignore[arg-type]
            pytest.raises(DeadlineExceededError, match=r"the deadline cannot be met: .* s are needed here"),
        ):
            # Enough for text encoding and decoding, as they are estimated on a busy machine, but not for the steps.
            client.generate(
                PROMPT, num_inference_steps=200, num_images_per_prompt=8, height=256, width=256, deadline_s=12.0
            )
    server.wait_until_idle()
    time.sleep(1.1)
    server.wait_for_metric("deadlines_exceeded_total", "denoising", refused + 2)


def test_a_deadline_that_can_be_met_is(server: RunningServer) -> None:
    with DiffusionClient(server.grpc_url) as client:
        started_s = time.monotonic()
        assert client.generate(PROMPT, num_inference_steps=4, deadline_s=60.0).images
        assert time.monotonic() - started_s < 60.0


def test_a_request_that_cannot_meet_its_deadline_any_more_is_dropped_at_a_step(server: RunningServer) -> None:
    with (
        DiffusionClient(server.grpc_url) as client,
        pytest.raises(DeadlineExceededError, match=r"given up in denoising after \d+ of 200 steps"),
    ):
        client.generate(PROMPT, num_inference_steps=200, height=256, width=256, deadline_s=1.5, deadline_action="drop")
    server.wait_until_idle()


def test_a_request_that_waits_is_dropped_at_its_deadline(server: RunningServer) -> None:
    with suspended(server, "denoising"), DiffusionClient(server.grpc_url) as client:
        started_s = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=r"given up in denoising after 0 of 2 steps"):
            client.generate(PROMPT, num_inference_steps=2, deadline_s=2.0, deadline_action="drop")
        assert time.monotonic() - started_s < 10
    server.wait_until_idle()


def test_a_request_that_wants_to_be_finished_late_is(server: RunningServer) -> None:
    with DiffusionClient(server.grpc_url) as client:
        assert client.generate(PROMPT, num_inference_steps=20, deadline_s=0.01, deadline_action="continue").images


# Overload, and caches.


def test_a_full_queue_says_how_full_it_is_and_how_long_it_needs(tmp_path: Path) -> None:
    with own_server(
        tmp_path, {"max_queue_size": "2", "max_queue_cost": "1000000", "scheduling_policy": "fifo"}
    ) as server:
        with DiffusionClient(server.grpc_url, retries=0) as client, ThreadPoolExecutor(8) as pool:
            client.generate(PROMPT, num_inference_steps=1)
            with suspended(server, "denoising"):
                running = [pool.submit(client.generate, PROMPT, num_inference_steps=50) for _ in range(2)]
                wait_until_in(server, "denoising", 2)
                with pytest.raises(
                    ServerUnavailableError,
                    match=r"the queue is full: 2 requests with \d+ tokens x steps wait or run "
                    r"\(parameter max_queue_size=2\); they need about \d+\.\d s; try again later",
                ):
                    client.generate(PROMPT, num_inference_steps=1)
            assert all(future.result(60).images for future in running)
            assert client.generate(PROMPT, num_inference_steps=1).images
        server.wait_until_idle()
        time.sleep(1.1)
        server.wait_for_metric("requests_refused_total", "denoising", 1)


def test_a_prompt_that_comes_again_is_not_encoded_again(server: RunningServer) -> None:
    def counts() -> tuple[float, float]:
        time.sleep(1.1)
        names = ("prompt_cache_hits_total", "prompt_cache_lookups_total")
        return tuple(server.metric(name, "text_encoding") for name in names)  # type: ignore[return-value]

    hits, lookups = counts()
    for seed in range(3):
        server.infer(prompt="a prompt that nobody else sends", seed=seed, num_inference_steps=1)
    assert counts() == (hits + 2, lookups + 3)


def test_the_response_cache_answers_equal_requests_and_never_with_another_seeds_picture(tmp_path: Path) -> None:
    with own_server(tmp_path, {}, response_cache=True, response_cache_bytes=64 * 2**20) as server:

        def draw(**inputs: Any) -> tuple[np.ndarray, int]:
            result = server.infer(prompt=PROMPT, num_inference_steps=3, output_format="raw", **inputs)
            return result.as_numpy("raw_image"), result.as_numpy("seed").item()

        first, again, other = draw(seed=1), draw(seed=1), draw(seed=2)
        time.sleep(1.1)
        server.wait_for_metric("requests_done_total", "denoising", 2)  # The second one came from the cache.
        assert (first[1], again[1], other[1]) == (1, 1, 2)
        assert np.array_equal(first[0], again[0])
        assert not np.array_equal(first[0], other[0])
        with pytest.raises(InferenceServerException, match="seed is missing: this server answers equal requests"):
            draw()
        assert draw(seed=2)[1] == 2


# Replicas.


def test_two_replicas_share_the_requests_by_their_work(tmp_path: Path) -> None:
    settings = {"num_gpus": "0", "denoising.gpu_device_ids": "0;1", "denoising.num_threads": "1"}
    with own_server(tmp_path, settings) as server:
        ranks = server.ranks("denoising")
        assert len(ranks) == 2
        before_s = [sum(rank.cpu_times()[:2]) for rank in ranks]
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(server.infer, prompt=PROMPT, num_inference_steps=20) for _ in range(8)]
            for future in futures:
                future.result(60)
        spent_s = [sum(psutil.Process(rank.pid).cpu_times()[:2]) - s for rank, s in zip(ranks, before_s, strict=True)]
        assert min(spent_s) > 0.3 * max(spent_s), f"processor seconds of the replicas: {spent_s}"
