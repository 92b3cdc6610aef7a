"""Which exception becomes of which answer."""

from __future__ import annotations

import grpc
import pytest

from triton_diffusion_client import (
    DiffusionClientError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerError,
    ServerUnavailableError,
    _grpc,
    errors,
)
from triton_diffusion_client._connection import Connection


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
        ("Request for unknown model: 'x' has no available versions", ModelNotFoundError),
        ("[request id: 3] Stub process 'diffusion_0_0' is not healthy.", ServerError),
        ("denoising is being unloaded; try again", ServerUnavailableError),
        ("cancelled in denoising after 3 steps", RequestCancelledError),
        ("height=7 is too small", InvalidRequestError),
    ],
)
def test_a_message_without_a_status_is_known_by_its_words(message: str, error: type[DiffusionClientError]) -> None:
    made = errors.error_from_message(message, InvalidRequestError, "r1")
    assert type(made) is error
    assert (str(made), made.status, made.request_id) == (message, None, "r1")


class RpcFailure(grpc.RpcError):
    """What gRPC raises, with the words that its version 1.85 was seen to use."""

    def __init__(self, message: str) -> None:
        self._message = message

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._message


@pytest.mark.parametrize(
    ("message", "is_connection"),
    [
        ("failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused", True),
        ("Stream removed (Socket closed)", True),
        ("DNS resolution failed for nowhere:8001: C-ares status is not ARES_SUCCESS", True),
        ("64 requests run already (parameter max_concurrent_requests); try again later", False),
        ("denoising is being unloaded; try again", False),
    ],
)
def test_a_connection_that_fails_is_told_from_a_server_that_refuses(message: str, is_connection: bool) -> None:
    connection = Connection(protocol="grpc", address="gpu:8001")
    made = _grpc.to_client_error(RpcFailure(message), connection)
    assert type(made) is ServerUnavailableError
    assert message in str(made)
    assert ("gpu:8001" in str(made)) == is_connection
    assert (str(made) == message) == (not is_connection)


def test_all_errors_have_one_base() -> None:
    for name in ("InvalidRequestError", "ModelNotFoundError", "ServerError", "RequestTimeoutError"):
        assert issubclass(getattr(errors, name), DiffusionClientError)
        assert name in (errors.__doc__ or "")
