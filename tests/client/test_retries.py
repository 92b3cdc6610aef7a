"""What is sent again, when, and what is sent then: of all four clients, and alone on a fake clock."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.client.conftest import Caller, TritonDouble

from checkpoints.timing import Clock, wait_until
from triton_diffusion_client import (
    AccessDeniedError,
    AsyncDiffusionClient,
    DeadlineExceededError,
    DiffusionClient,
    DiffusionClientError,
    GenerationOptions,
    GenerationResult,
    InvalidRequestError,
    ModelNotFoundError,
    Progress,
    RequestCancelledError,
    RequestTimeoutError,
    ResourceExhaustedError,
    ServerError,
    ServerUnavailableError,
    _grpc,
    _http,
    _retries,
    cli,
)
from triton_diffusion_client._connection import open_connection
from triton_diffusion_client._protocol import build_request
from triton_diffusion_client._retries import Attempts, RetryPolicy

FULL = ("UNAVAILABLE", 503, "the queue is full: 3 requests, they need about 0.1 s; try again later")
DEAD_STUB = ("INTERNAL", 500, "Stub process 'diffusion_0_0' is not healthy.")
UNLOADED = ("NOT_FOUND", 404, "Request for unknown model: 'diffusion' has no available versions")
TWICE: dict[str, Any] = {"retries": 2}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of hundredths of a second."""
    monkeypatch.setattr(_retries, "_FIRST_PAUSE_S", 0.01)


def attempts_of(
    clock: Clock,
    *,
    retries: int = 20,
    retry_timeout_s: float = 120.0,
    connect_timeout_s: float | None = None,
    connected: threading.Event | None = None,
    **options: Any,
) -> Attempts:
    request = build_request(
        "diffusion", "x", options, allowed=GenerationOptions, cancel_scope="", default_timeout_s=None
    )
    policy = RetryPolicy(retries=retries, retry_timeout_s=retry_timeout_s, connect_timeout_s=connect_timeout_s)
    connected = connected or threading.Event()
    return Attempts(request, policy, threading.Event(), connected, clock=clock, draw=lambda: 0.5)


def refused() -> ServerUnavailableError:
    """What a client raises where nothing listens."""
    connection = open_connection(url="127.0.0.1:1", protocol="grpc", headers=None, ssl=False)
    return connection.unreachable("connection refused", was_connected=False)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("refusal", [FULL, DEAD_STUB, UNLOADED])
def test_a_request_that_is_refused_twice_is_answered_at_the_third_attempt(
    caller: Caller, triton: TritonDouble, caplog: pytest.LogCaptureFixture, refusal: tuple[str, int, str]
) -> None:
    triton.refusals = [refusal] * 2
    with caplog.at_level(logging.WARNING, "triton_diffusion_client"):
        assert caller.generate("x", client=TWICE, request_id="r1").seeds == [7]
    assert [request.id for request in triton.received] == ["r1"] * 3
    assert [request.value("seed") for request in triton.received] == [7] * 3
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert warnings[0].startswith(f"request r1: {refusal[2]}; attempt 2 of at most 3 in ")


@pytest.mark.usefixtures("quick")
def test_a_stream_that_is_refused_twice_is_answered_at_the_third_attempt(caller: Caller, triton: TritonDouble) -> None:
    triton.refusals = [FULL] * 2
    *progress, result = caller.stream("x", client=TWICE)
    assert isinstance(result, GenerationResult)
    assert [(event.step, event.restarts) for event in progress] == [(1, 2), (2, 2), (3, 2)]


@pytest.mark.usefixtures("quick")
def test_a_stream_that_breaks_is_started_anew_and_says_so(caller: Caller, triton: TritonDouble) -> None:
    triton.num_breaks = 1
    *progress, result = caller.stream("slow", client=TWICE)
    assert isinstance(result, GenerationResult)
    told = [(event.step, event.restarts) for event in progress if isinstance(event, Progress)]
    assert told[-3:] == [(1, 1), (2, 1), (3, 1)]
    assert set(told[:-3]) <= {(1, 0), (2, 0)}
    assert len({request.value("seed") for request in triton.received}) == 1


@pytest.mark.usefixtures("quick")
def test_the_last_error_is_raised_when_there_are_no_attempts_left(caller: Caller, triton: TritonDouble) -> None:
    triton.refusals = [FULL] * 10
    for call in (caller.generate, caller.stream):
        triton.received.clear()
        with pytest.raises(ServerUnavailableError) as caught:
            call("x", client=TWICE)
        assert (str(caught.value), caught.value.attempts, len(triton.received)) == (FULL[2], 3, 3)


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (("INVALID_ARGUMENT", 400, "height=7 is wrong"), InvalidRequestError),
        (("INVALID_ARGUMENT", 400, "RESOURCE_EXHAUSTED: 4096x4096 does not fit"), ResourceExhaustedError),
        (("UNAVAILABLE", 503, "DEADLINE_EXCEEDED: deadline_s=3 cannot be met"), DeadlineExceededError),
        (("CANCELLED", 400, "cancelled in denoising"), RequestCancelledError),
        (("INTERNAL", 500, "DenoisingStage raised ValueError"), ServerError),
        (("NOT_FOUND", 404, "Request for unknown model: 'diffusion' is not found"), ModelNotFoundError),
        (("UNAVAILABLE", 403, "This API is restricted, expecting header 'key'"), AccessDeniedError),
    ],
)
def test_what_would_fail_again_is_sent_once(
    caller: Caller, triton: TritonDouble, refusal: tuple[str, int, str], error: type[DiffusionClientError]
) -> None:
    triton.refusals = [refusal]
    with pytest.raises(error) as caught:
        caller.generate("x", client=TWICE)
    assert type(caught.value) is error
    assert len(triton.received) == 1


@pytest.mark.usefixtures("quick")
def test_a_server_that_comes_back_is_found(caller: Caller, triton: TritonDouble) -> None:
    """It dies while two requests run, refuses connections for longer than a server that never was there may, and
    another listens at its address.
    """
    ports = [int(url.rpartition(":")[2]) for url in (triton.grpc_url, triton.http_url)]
    returned: list[TritonDouble] = []
    with ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(call, "slow", client={"retries": 20, "connect_timeout_s": 0.1}, num_inference_steps=20)
            for call in (caller.generate, caller.stream)
        ]
        wait_until(lambda: len(triton.received) == 2, timeout_s=10.0)
        triton.die()
        triton.stop()
        time.sleep(0.3)
        returned.append(TritonDouble(grpc_port=ports[0], http_port=ports[1]))
        try:
            generated, streamed = (future.result(60) for future in asked)
        finally:
            returned[0].stop()
    assert generated.seeds == streamed[-1].seeds == [7]
    assert [request.value("seed") for request in returned[0].received] == [7, 7]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_cancel_ends_the_pause_at_once(triton: TritonDouble, protocol: Any) -> None:
    triton.refusals = [("UNAVAILABLE", 503, "the queue is full; they need about 30 s")] * 2
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    started_s = time.monotonic()
    with DiffusionClient(url, protocol) as client, ThreadPoolExecutor() as threads:
        waiting = threads.submit(client.generate, "x", request_id="r1")
        wait_until(lambda: any(attempts.is_pausing for attempts in client._under_way), timeout_s=10.0)
        assert client.cancel("r1")
        with pytest.raises(RequestCancelledError) as caught:
            waiting.result(5)
        assert caught.value.request_id == "r1"

    async def run() -> None:
        async with AsyncDiffusionClient(url, protocol) as client:
            waiting = asyncio.create_task(client.generate("x", request_id="r2"))
            while not any(attempts.is_pausing for attempts in client._under_way):
                await asyncio.sleep(0.01)
            assert await client.cancel("r2")
            with pytest.raises(RequestCancelledError):
                await waiting

    asyncio.run(run())
    assert time.monotonic() - started_s < 8
    assert [request.model for request in triton.received] == ["diffusion"] * 2, "the server is not asked"


def test_closing_the_client_ends_the_pause(triton: TritonDouble) -> None:
    triton.refusals = [("UNAVAILABLE", 503, "the queue is full; they need about 30 s")]
    client = DiffusionClient(triton.grpc_url)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(client.generate, "x")
        wait_until(lambda: any(attempts.is_pausing for attempts in client._under_way), timeout_s=10.0)
        client.close()
        with pytest.raises(RequestCancelledError):
            waiting.result(5)


def test_the_command_line_shows_each_attempt_and_takes_the_limits(
    triton: TritonDouble, tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retries, "_FIRST_PAUSE_S", 0.01)
    triton.refusals = [FULL] * 3
    arguments = ["generate", "--url", triton.grpc_url, "--prompt", "x", "--output", str(tmp_path), "--request-id", "r1"]
    assert cli.main([*arguments, "--retries", "1"]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: request r1: {FULL[2]}; attempt 2 of at most 2 in ")
    assert last == f"error: {FULL[2]} (given up after 2 attempts)"
    assert cli.main([*arguments, "--retry-timeout-s", "5"]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_pauses_grow_to_ten_seconds_and_all_together_last_no_longer_than_allowed() -> None:
    clock = Clock()
    attempts = attempts_of(clock)
    pauses = []
    while sum(pauses) < 120:
        attempts.next_request()
        pauses.append(attempts.pause_after(ServerUnavailableError("gone")))
    assert pauses[:6] == [0.5, 1, 2, 4, 8, 10]
    assert sum(pauses) == 120
    assert len(pauses) < 20
    attempts.next_request()
    with pytest.raises(ServerUnavailableError, match="gone"):
        attempts.pause_after(ServerUnavailableError("gone"))


@pytest.mark.parametrize(("words", "pause_s"), [("about 3.2 s", 3.2), ("about 99999 s", 30), ("about 0.1 s", 0.5)])
def test_a_pause_is_as_long_as_the_server_says_that_it_needs_within_bounds(words: str, pause_s: float) -> None:
    attempts = attempts_of(Clock())
    attempts.next_request()
    assert attempts.pause_after(ServerUnavailableError(f"the queue is full; they need {words}")) == pause_s


def test_a_hundred_clients_do_not_come_back_together() -> None:
    pauses = []
    for _ in range(100):
        attempts = attempts_of(Clock())
        attempts._draw = random.random
        attempts.next_request()
        pauses.append(attempts.pause_after(ServerUnavailableError("they need about 4 s")))
    assert 2 <= min(pauses) < 3
    assert 5 < max(pauses) <= 6


def test_time_out_and_deadline_count_from_the_first_attempt() -> None:
    clock = Clock()
    attempts = attempts_of(clock, timeout_s=60, deadline_s=30)
    first = attempts.next_request()
    assert (first.timeout_s, first.values["deadline_s"]) == (60, 30)
    clock.now_s += 10
    attempts.pause_after(ServerUnavailableError("gone"))
    second = attempts.next_request()
    assert (second.timeout_s, second.values["deadline_s"]) == (50, 20)
    clock.now_s += 20
    attempts.pause_after(ServerUnavailableError("gone"))
    with pytest.raises(DeadlineExceededError, match=r"^DEADLINE_EXCEEDED: no result within deadline_s=30 after 2 att"):
        attempts.next_request()


def test_a_request_that_may_be_late_is_still_sent_after_its_deadline() -> None:
    clock = Clock()
    attempts = attempts_of(clock, deadline_s=30, deadline_action="continue")
    attempts.next_request()
    clock.now_s += 31
    attempts.pause_after(ServerUnavailableError("gone"))
    assert 0 < float(attempts.next_request().values["deadline_s"]) < 0.01


def test_a_pause_beyond_the_time_out_is_not_begun() -> None:
    clock = Clock()
    attempts = attempts_of(clock, timeout_s=10)
    attempts.next_request()
    clock.now_s += 8
    with pytest.raises(ServerUnavailableError, match="they need about 3 s"):
        attempts.pause_after(ServerUnavailableError("they need about 3 s"))


def test_the_time_out_of_a_later_attempt_tells_the_whole_time_and_the_error_before_it() -> None:
    attempts = attempts_of(Clock(), timeout_s=10)
    attempts.next_request()
    attempts.pause_after(ServerUnavailableError("gone"))
    with pytest.raises(RequestTimeoutError, match=r"no result within timeout_s=10 after 2 attempts.*gone"):
        attempts.pause_after(RequestTimeoutError("no answer within timeout_s=9.5"))


def test_a_certificate_that_is_not_trusted_is_not_tried_again() -> None:
    attempts = attempts_of(Clock())
    attempts.next_request()
    with pytest.raises(ServerUnavailableError):
        attempts.pause_after(ServerUnavailableError("cannot reach a server: [SSL: CERTIFICATE_VERIFY_FAILED]"))


@pytest.mark.parametrize(
    "limits",
    [{"retries": -1}, {"retry_timeout_s": -1}, {"retry_timeout_s": float("nan")}, {"connect_timeout_s": -1}],
)
def test_limits_below_nothing_are_refused(limits: Any) -> None:
    for client in (DiffusionClient, AsyncDiffusionClient):
        with pytest.raises(ValueError, match="below 0"):
            client(**limits)


def test_a_server_that_was_never_there_is_given_up_after_the_connect_timeout() -> None:
    clock = Clock()
    attempts = attempts_of(clock, connect_timeout_s=5)
    pauses = []
    for _ in range(4):
        attempts.next_request()
        pauses.append(attempts.pause_after(refused()))
        clock.now_s += pauses[-1]
    assert pauses == [0.5, 1, 2, 1.5]
    attempts.next_request()
    with pytest.raises(
        ServerUnavailableError, match=r"at 127\.0\.0\.1:1 .*'triton-diffusion serve'.*_timeout_s=5$"
    ) as caught:
        attempts.pause_after(refused())
    assert (caught.value.attempts, caught.value.request_id) == (5, attempts.request_id)


@pytest.mark.parametrize("first", [ServerUnavailableError("is full"), ServerUnavailableError("socket closed")])
def test_a_server_that_was_there_is_waited_for_beyond_the_connect_timeout(first: ServerUnavailableError) -> None:
    """By all requests of the client: also by one whose first attempt finds it gone."""
    clock, connected = Clock(), threading.Event()
    attempts = attempts_of(clock, connect_timeout_s=5, connected=connected)
    attempts.next_request()
    attempts.pause_after(first)
    for each in (attempts, attempts_of(clock, connect_timeout_s=5, connected=connected)):
        each.next_request()
        clock.now_s += 10
        assert each.pause_after(refused()) > 0


def test_a_client_without_a_connect_timeout_waits_for_a_server_that_was_never_there() -> None:
    clock = Clock()
    attempts = attempts_of(clock)
    attempts.next_request()
    clock.now_s += 100
    assert attempts.pause_after(refused()) > 0


@pytest.mark.parametrize("ask", ["generate", "is_ready"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_what_a_server_answers_shows_that_it_is_there(triton: TritonDouble, protocol: Any, ask: str) -> None:
    url = triton.grpc_url if protocol == "grpc" else triton.http_url

    async def run() -> bool:
        async with AsyncDiffusionClient(url, protocol) as client:
            await (client.generate("x") if ask == "generate" else client.is_ready())
            return client._was_connected.is_set()

    with DiffusionClient(url, protocol) as client:
        assert not client._was_connected.is_set()
        assert client.generate("x") if ask == "generate" else client.is_ready()
        assert client._was_connected.is_set()
    assert asyncio.run(run())


@pytest.fixture(params=["nothing listens", "another protocol", "no answer to a connection"])
def wrong_address(
    request: pytest.FixtureRequest, caller: Caller, triton: TritonDouble, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An address at which no server of the caller's protocol is."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as other,
        socket.socket() as first,
        socket.socket() as second,
    ):
        port = other.getsockname()[1]
        match request.param:
            case "nothing listens":
                other.close()
            case "another protocol":
                port = int((triton.http_url if caller.protocol == "grpc" else triton.grpc_url).rpartition(":")[2])
            case _:
                # The queue of those whom nobody accepts is full: the system drops what else comes.
                first.connect(other.getsockname())
                second.setblocking(False)
                second.connect_ex(other.getsockname())
                for transport in (_grpc, _http):
                    monkeypatch.setattr(transport, "CONNECTION_TIMEOUT_S", 0.2)
                options = [(name, 200 if "min_reconnect" in name else value) for name, value in _grpc._CHANNEL_OPTIONS]
                monkeypatch.setattr(_grpc, "_CHANNEL_OPTIONS", options)
        yield f"127.0.0.1:{port}"


def test_a_wrong_address_is_known_after_the_connect_timeout(caller: Caller, wrong_address: str) -> None:
    caller.url = wrong_address
    limits = {"retries": 20, "connect_timeout_s": 0.3}
    started_s = time.monotonic()
    for call in (caller.generate, caller.stream):
        with pytest.raises(ServerUnavailableError, match=r"connect_timeout_s=0\.3$") as caught:
            call("x", client=limits)
        assert not caught.value.was_connected
        assert caught.value.attempts >= 2
        assert f"cannot reach a server at {wrong_address}" in str(caught.value)
    assert time.monotonic() - started_s < 20


def test_the_command_line_gives_up_an_address_without_a_server_after_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_CONNECT_TIMEOUT_S", 0.3)
    for arguments in (["families"], ["generate", "--prompt", "x"]):
        assert cli.main([*arguments, "--url", "127.0.0.1:1"]) == 1
        *warnings, error = capsys.readouterr().err.splitlines()
        assert warnings[0].startswith("warning: request ")
        assert error.startswith("error: cannot reach a server at 127.0.0.1:1 (")
        assert "start one with 'triton-diffusion serve'" in error
        assert f"connect_timeout_s=0.3 (given up after {len(warnings) + 1} attempts)" in error
