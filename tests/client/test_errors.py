"""Which exception becomes of which answer."""

from __future__ import annotations

import grpc
import pytest

from triton_diffusion_client import (
    AccessDeniedError,
    DeadlineExceededError,
    DiffusionClientError,
    GenerationOptions,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    RequestTimeoutError,
    ResourceExhaustedError,
    ServerError,
    ServerUnavailableError,
    _grpc,
    errors,
)
from triton_diffusion_client._connection import Connection
from triton_diffusion_client._protocol import build_request


@pytest.mark.parametrize(
    ("grpc_status", "http_status", "error"),
    [
        ("INVALID_ARGUMENT", "400", InvalidRequestError),
        ("NOT_FOUND", "404", ModelNotFoundError),
        ("UNAVAILABLE", "503", ServerUnavailableError),
        ("DEADLINE_EXCEEDED", "504", RequestTimeoutError),
        ("CANCELLED", "499", RequestCancelledError),
        ("INTERNAL", "500", ServerError),
        ("UNIMPLEMENTED", "501", InvalidRequestError),
        ("UNKNOWN", "418", ServerError),
    ],
)
def test_a_status_has_its_exception(grpc_status: str, http_status: str, error: type[DiffusionClientError]) -> None:
    for status in (grpc_status, http_status):
        made = errors.error_from_status(status, "the server's words", "r1")
        assert type(made) is error
        assert (str(made), made.status, made.request_id) == ("the server's words", status, "r1")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Request for unknown model: 'x' is not found", ModelNotFoundError),
        ("Request for unknown model: 'x' has no available versions", ServerUnavailableError),
        ("[request id: 3] Stub process 'diffusion_0_0' is not healthy.", ServerUnavailableError),
        ("This protocol is restricted, expecting header 'key'", AccessDeniedError),
        ("RESOURCE_EXHAUSTED: 4096x4096 does not fit; try again", ResourceExhaustedError),
        ("denoising is being unloaded; try again", ServerUnavailableError),
        ("cancelled in denoising after 3 steps", RequestCancelledError),
        ("height=7 is too small", InvalidRequestError),
    ],
)
def test_a_message_without_a_status_is_known_by_its_words(message: str, error: type[DiffusionClientError]) -> None:
    made = errors.error_from_message(message, InvalidRequestError, "r1")
    assert type(made) is error
    assert (str(made), made.status, made.request_id) == (message, None, "r1")


@pytest.mark.parametrize("status", ["UNAVAILABLE", "503", "CANCELLED", "400", "INTERNAL", "DEADLINE_EXCEEDED", "418"])
def test_a_missed_deadline_is_known_by_how_its_message_begins_whatever_the_status(status: str) -> None:
    message = "DEADLINE_EXCEEDED: deadline_s=3 cannot be met"
    made = errors.error_from_status(status, message, "r1")
    assert type(made) is DeadlineExceededError
    assert (str(made), made.status, made.request_id) == (message, status, "r1")


@pytest.mark.parametrize("words", ["try again", "the queue is full", "cancelled after 3 steps", "is not ready"])
def test_a_missed_deadline_is_known_whatever_else_its_message_says(words: str) -> None:
    for default in (InvalidRequestError, ServerError):
        made = errors.error_from_message(f"DEADLINE_EXCEEDED: {words}", default, "r1")
        assert type(made) is DeadlineExceededError
        assert (made.status, made.request_id) == (None, "r1")


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        ("INTERNAL", "Stub process 'diffusion_0_0' is not healthy.", ServerUnavailableError),
        (
            "500",
            "Model denoising - Error when running inference: Model 'denoising' is not ready.",
            ServerUnavailableError,
        ),
        ("404", "Request for unknown model: 'diffusion' has no available versions", ServerUnavailableError),
        ("404", "Request for unknown model: 'diffusion' is not found", ModelNotFoundError),
        ("403", "This API is restricted, expecting header 'triton-diffusion-admin-key'", AccessDeniedError),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'triton-grpc-protocol-key'", AccessDeniedError),
        ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED: one picture of 4096x4096 does not fit", ResourceExhaustedError),
        ("400", "RESOURCE_EXHAUSTED: one picture of 4096x4096 does not fit", ResourceExhaustedError),
        ("INTERNAL", "DenoisingStage raised ValueError", ServerError),
    ],
)
def test_what_triton_was_seen_to_say_is_known_by_its_words(
    status: str, message: str, error: type[DiffusionClientError]
) -> None:
    """Triton 24.10: the stub of a chain or stage killed, the model unloaded, an API closed by a key."""
    made = errors.error_from_status(status, message, "r1")
    assert type(made) is error
    assert (str(made), made.status) == (message, status)


def test_a_message_that_mentions_a_deadline_later_on_is_no_missed_deadline() -> None:
    message = "the worker said DEADLINE_EXCEEDED: too late"
    assert type(errors.error_from_status("UNAVAILABLE", message)) is ServerUnavailableError
    assert type(errors.error_from_message(message, ServerError)) is ServerError


class RpcFailure(grpc.RpcError):
    """What gRPC raises, with the words that its version 1.85 was seen to use."""

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self._message, self._code = message, code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._message


@pytest.mark.parametrize(
    ("message", "is_connection", "was_connected"),
    [
        ("failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused", True, False),
        ("failed to connect to all addresses; last error: UNAVAILABLE: 127.0.0.1:1: Socket closed", True, False),
        ("Stream removed (Socket closed)", True, True),
        ("DNS resolution failed for nowhere:8001: C-ares status is not ARES_SUCCESS", True, False),
        ("errors resolving nowhere:8001: [field:hostname lookup error:Domain name not found]", True, False),
        ("64 requests run already (parameter max_concurrent_requests); try again later", False, True),
        ("denoising is being unloaded; try again", False, True),
    ],
)
def test_a_connection_that_fails_is_told_from_a_server_that_refuses(
    message: str, is_connection: bool, was_connected: bool
) -> None:
    connection = Connection(protocol="grpc", address="gpu:8001")
    made = _grpc.to_client_error(RpcFailure(message), connection)
    assert type(made) is ServerUnavailableError
    assert made.was_connected == was_connected
    assert message in str(made)
    assert ("gpu:8001" in str(made)) == is_connection
    assert (str(made) == message) == (not is_connection)


def test_over_grpc_a_missed_deadline_is_told_from_a_connection_that_fails_and_from_a_time_out() -> None:
    connection = Connection(protocol="grpc", address="gpu:8001")
    request = build_request(
        "diffusion", "x", {"timeout_s": 3}, allowed=GenerationOptions, cancel_scope="", default_timeout_s=None
    )
    for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        failure = RpcFailure("DEADLINE_EXCEEDED: a worker's socket closed", code)
        assert type(_grpc.to_client_error(failure, connection, request)) is DeadlineExceededError
    timed_out = RpcFailure("Deadline Exceeded", grpc.StatusCode.DEADLINE_EXCEEDED)
    assert type(_grpc.to_client_error(timed_out, connection, request)) is RequestTimeoutError


def test_all_errors_have_one_base() -> None:
    for name in (
        "InvalidRequestError",
        "ModelNotFoundError",
        "ServerError",
        "RequestTimeoutError",
        "DeadlineExceededError",
    ):
        assert issubclass(getattr(errors, name), DiffusionClientError)
        assert name in (errors.__doc__ or "")
