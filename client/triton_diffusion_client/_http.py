"""Requests over HTTP: Triton's /infer with binary tensors, and /generate_stream with server-sent events.

Triton notices a closed connection only when it next writes to it. So a stream is cancelled at the request's next
step, but a single answer is made to the end unless the model keeps to the time-out, which is sent for that reason.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import numpy as np
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput, InferResult

from triton_diffusion_client._answers import FOREIGN_ANSWER_ERRORS, ModelState, Outputs, foreign_answer
from triton_diffusion_client._connection import CONNECTION_TIMEOUT_S, Connection
from triton_diffusion_client._protocol import WireRequest
from triton_diffusion_client.errors import (
    DiffusionClientError,
    InvalidRequestError,
    RequestTimeoutError,
    ServerError,
    error_from_message,
    error_from_status,
)

# A stream is JSON text, so a picture or video in it is base64.
_TEXT_FORMATS = {name: f"b64_{name}" for name in ("png", "jpeg", "webp", "mp4", "webm", "gif")}
_EVENT_STREAM = "text/event-stream"
# What the libraries raise for an answer that does not begin as one of HTTP does: the gRPC port's, for example.
_BAD_STATUS_LINES = (http.client.BadStatusLine, aiohttp.ClientResponseError)
_READ_SIZE_BYTES = 1 << 16


@dataclass(frozen=True)
class HttpRequest:
    """What is posted: a path below the server's address, headers and a body."""

    path: str
    headers: dict[str, str]
    body: bytes


def to_infer_request(request: WireRequest) -> HttpRequest:
    """The request for one response, tensors in binary."""
    inputs = []
    for name, datatype, content in request.tensors():
        tensor = InferInput(name, list(content.shape), datatype)
        tensor.set_data_from_numpy(content)
        inputs.append(tensor)
    timeout_us = None if request.timeout_s is None else int(request.timeout_s * 1e6)
    body, header_length = InferenceServerClient.generate_request_body(
        inputs, request_id=request.request_id, timeout=timeout_us, parameters=dict(request.parameters)
    )
    # Without any input all of the body is JSON, and there is no length to tell it by.
    headers = {} if header_length is None else {"Inference-Header-Content-Length": str(header_length)}
    return HttpRequest(_model_path(request, "infer"), headers, body)


def to_stream_request(request: WireRequest) -> HttpRequest:
    """The request for a stream, all in JSON. Raises ValueError for a format that does not fit into it.

    Triton takes a field that names no input for a parameter of the request.
    """
    fields: dict[str, Any] = {**request.values, **request.parameters, "id": request.request_id}
    if request.output_format is not None:
        fields["output_format"] = _text_format(request.output_format)
    if request.images:
        fields["image"] = [base64.b64encode(image).decode() for image in request.images]
    headers = {"Content-Type": "application/json"}
    return HttpRequest(_model_path(request, "generate_stream"), headers, json.dumps(fields).encode())


def _text_format(output_format: str) -> str:
    text_format = _TEXT_FORMATS.get(output_format, output_format)
    if not text_format.startswith("b64_"):
        raise ValueError(
            f"output_format={output_format!r} cannot be streamed over HTTP, which carries text; "
            f"use {', '.join(map(repr, _TEXT_FORMATS))}, protocol='grpc', or generate()"
        )
    return text_format


def _check_stream(request: WireRequest) -> None:
    if request.output_format is not None:
        _text_format(request.output_format)


def _model_path(request: WireRequest, verb: str) -> str:
    return f"/v2/models/{quote(request.model, safe='')}/{verb}"


def _to_control_request(request: WireRequest, verb: str) -> HttpRequest:
    return HttpRequest(f"/v2/repository/models/{quote(request.model, safe='')}/{verb}", {}, b"{}")


def read_infer_response(status: int, headers: Any, body: bytes, request: WireRequest) -> Outputs:
    """The outputs in a response, or raise the error in it."""
    if status != http.client.OK:
        raise _error(status, headers, body, request)
    header_length = headers.get("Inference-Header-Content-Length")
    try:
        outputs: Outputs = InferResult.from_response_body(
            body, header_length=None if header_length is None else int(header_length)
        )
    except FOREIGN_ANSWER_ERRORS as error:
        raise foreign_answer(error, request) from error
    return outputs


def _error(status: int, headers: Any, body: bytes, request: WireRequest) -> DiffusionClientError:
    text = body.decode(errors="replace").strip()
    if (headers.get("Content-Type") or "").startswith(_EVENT_STREAM):
        # Triton answers 400 whatever the model's error was; before the first step it is mostly the caller's.
        events = EventDecoder(request).decode(body)
        message = next((str(event["error"]) for event in events if "error" in event), text)
        return error_from_message(message, InvalidRequestError, request.request_id)
    try:
        message = str(json.loads(text)["error"])
    except FOREIGN_ANSWER_ERRORS:
        message = text or f"the server answered HTTP {status} {http.client.responses.get(status, '')} without a word"
    if status == http.client.BAD_REQUEST and "cancelled" in message:
        # Not every version of Triton has an HTTP status of its own for a cancel.
        return error_from_message(message, InvalidRequestError, request.request_id)
    return error_from_status(str(status), message, request.request_id)


class JsonOutputs:
    """One event of a stream; a tensor of one element is a plain value there."""

    def __init__(self, event: dict[str, Any]) -> None:
        self._event = event

    def as_numpy(self, name: str) -> NDArray[Any] | None:
        """The output as a flat array, or None."""
        if name not in self._event:
            return None
        value = self._event[name]
        values = value if isinstance(value, list) else [value]
        return np.array(values, dtype=np.object_ if isinstance(values[0], str) else None)


class EventDecoder:
    """Server-sent events out of the pieces in which they arrive."""

    def __init__(self, request: WireRequest) -> None:
        self._request = request
        self._pieces: list[bytes] = []

    def decode(self, piece: bytes) -> list[dict[str, Any]]:
        """The events that are complete with this piece."""
        self._pieces.append(piece)
        if b"\n" not in piece:
            return []
        *lines, rest = b"".join(self._pieces).split(b"\n")
        self._pieces = [rest]
        try:
            return [dict(json.loads(line[len(b"data:") :])) for line in lines if line.startswith(b"data:")]
        except FOREIGN_ANSWER_ERRORS as error:
            raise ServerError(f"an event of the stream is not JSON ({error})") from error

    def decode_outputs(self, piece: bytes) -> Iterator[Outputs]:
        """The responses that are complete with this piece; raises the error among them."""
        for event in self.decode(piece):
            if "error" in event:
                raise error_from_message(str(event["error"]), ServerError, self._request.request_id)
            yield JsonOutputs(event)


def _to_client_error(
    error: Exception, connection: Connection, request: WireRequest, *, was_connected: bool
) -> DiffusionClientError:
    """Our exception for one of http.client, aiohttp or the system."""
    is_late = isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError)
    if is_late and request.timeout_s is not None:
        return RequestTimeoutError(
            f"no answer within timeout_s={request.timeout_s:g}; the connection was closed",
            request_id=request.request_id,
        )
    if isinstance(error, _BAD_STATUS_LINES) and not isinstance(error, http.client.RemoteDisconnected):
        return connection.unreachable("what answers there speaks no HTTP", request.request_id, was_connected=False)
    return connection.unreachable(error, request.request_id, was_connected=was_connected)


def _ssl_context(connection: Connection) -> ssl.SSLContext | None:
    if not connection.ssl:
        return None
    context = ssl.create_default_context(cafile=connection.root_certificates)
    if connection.certificate_chain is not None:
        context.load_cert_chain(connection.certificate_chain, connection.private_key)
    return context


class _Exchange:
    """One request on a connection of its own: threads share nothing, and closing it concerns no other request."""

    def __init__(self, connection: Connection, context: ssl.SSLContext | None, timeout_s: float | None) -> None:
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        connection_timeout_s = min(CONNECTION_TIMEOUT_S, timeout_s or CONNECTION_TIMEOUT_S)
        url = urlsplit(f"//{connection.address}")
        assert url.hostname is not None
        self._base_path = url.path
        self._headers = dict(connection.headers)
        self._http: http.client.HTTPConnection
        self._response: http.client.HTTPResponse | None = None
        self.was_connected = False
        if context is not None:
            self._http = http.client.HTTPSConnection(
                url.hostname, url.port, timeout=connection_timeout_s, context=context
            )
        else:
            self._http = http.client.HTTPConnection(url.hostname, url.port, timeout=connection_timeout_s)

    def send(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> None:
        """Connect, send, and wait for the head of the answer; then `status` and `headers` are there."""
        try:
            self._http.connect()
        except TimeoutError as error:
            if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                raise
            raise ConnectionError(f"no connection within {CONNECTION_TIMEOUT_S:g} s") from error
        self.was_connected = True
        self._socket = self._http.sock
        self._limit_wait()
        self._http.request(method, self._base_path + path, body, {**self._headers, **headers})
        self._response = response = self._http.getresponse()
        self.status, self.headers = response.status, response.headers

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives."""
        assert self._response is not None
        self._limit_wait()
        while piece := self._response.read1(_READ_SIZE_BYTES):
            yield piece
            self._limit_wait()

    def _limit_wait(self) -> None:
        """A socket's time-out is for each wait; ours is for the whole request."""
        remaining_s = None if self._deadline_s is None else self._deadline_s - time.monotonic()
        if remaining_s is not None and remaining_s <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining_s)

    def close(self) -> None:
        """Close the connection, whatever is under way on it."""
        if self._response is not None:
            self._response.close()
        self._http.close()


class HttpTransport:
    """Blocking requests, each on a connection of its own; any number of threads may use it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._context = _ssl_context(connection)

    def infer(self, request: WireRequest) -> Outputs:
        """Send a request and wait for its one response."""
        status, headers, body = self._post(to_infer_request(request), request)
        return read_infer_response(status, headers, body, request)

    def list_models(self, request: WireRequest) -> list[ModelState]:
        """The models in the server's repository, loaded or not; the request names none."""
        status, headers, body = self._post(HttpRequest("/v2/repository/index", {}, b"{}"), request)
        if status != http.client.OK:
            raise _error(status, headers, body, request)
        try:
            return [ModelState(str(entry["name"]), str(entry.get("state", ""))) for entry in json.loads(body)]
        except FOREIGN_ANSWER_ERRORS as error:
            raise foreign_answer(error, request) from error

    def load_model(self, request: WireRequest) -> None:
        """Load a model; returns when it is ready."""
        self._control(request, "load")

    def unload_model(self, request: WireRequest) -> None:
        """Ask the server to unload a model; it does so once the model's requests are done."""
        self._control(request, "unload")

    def _control(self, request: WireRequest, verb: str) -> None:
        status, headers, body = self._post(_to_control_request(request, verb), request)
        if status != http.client.OK:
            raise _error(status, headers, body, request)

    def _post(self, post: HttpRequest, request: WireRequest) -> tuple[int, Any, bytes]:
        """Status, headers and body of the answer."""
        exchange = _Exchange(self._connection, self._context, request.timeout_s)
        try:
            exchange.send("POST", post.path, post.headers, post.body)
            return exchange.status, exchange.headers, b"".join(exchange.pieces())
        except (OSError, http.client.HTTPException) as error:
            raise _to_client_error(error, self._connection, request, was_connected=exchange.was_connected) from None
        finally:
            exchange.close()

    def check_stream(self, request: WireRequest) -> None:
        """Raises ValueError for a format that HTTP cannot stream."""
        _check_stream(request)

    def stream(self, request: WireRequest) -> Generator[Outputs, None, None]:
        """Send a request and yield its responses; closing the iterator closes the connection."""
        return self._receive(to_stream_request(request), request)

    def _receive(self, post: HttpRequest, request: WireRequest) -> Generator[Outputs, None, None]:
        exchange = _Exchange(self._connection, self._context, request.timeout_s)
        decoder = EventDecoder(request)
        try:
            exchange.send("POST", post.path, post.headers, post.body)
            if exchange.status != http.client.OK:
                raise _error(exchange.status, exchange.headers, b"".join(exchange.pieces()), request)
            for piece in exchange.pieces():
                yield from decoder.decode_outputs(piece)
        except (OSError, http.client.HTTPException) as error:
            raise _to_client_error(error, self._connection, request, was_connected=exchange.was_connected) from None
        finally:
            exchange.close()

    def is_ready(self, model: str, timeout_s: float) -> bool:
        """Whether the server and the model are ready. Raises ServerUnavailableError if the server does not say."""
        return all(self._answers_ok(path, timeout_s) for path in _readiness_paths(model))

    def _answers_ok(self, path: str, timeout_s: float) -> bool:
        exchange = _Exchange(self._connection, self._context, timeout_s)
        try:
            exchange.send("GET", path, {})
            return exchange.status == http.client.OK
        except (OSError, http.client.HTTPException) as error:
            raise self._connection.unreachable(error) from None
        finally:
            exchange.close()

    def close(self) -> None:
        """Nothing to do: no connection outlives its request."""


def _readiness_paths(model: str) -> tuple[str, str]:
    return "/v2/health/ready", f"/v2/models/{quote(model, safe='')}/ready"


class AsyncHttpTransport:
    """The same for asyncio; made and used inside one event loop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._base_url = f"{'https' if connection.ssl else 'http'}://{connection.address}"
        context = _ssl_context(connection)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=True if context is None else context),
            headers=connection.headers,
        )

    async def infer(self, request: WireRequest) -> Outputs:
        """Send a request and wait for its one response; cancelling the task closes the connection."""
        try:
            async with self._post(to_infer_request(request), request) as response:
                return read_infer_response(response.status, response.headers, await response.read(), request)
        except (OSError, aiohttp.ClientError) as error:
            raise self._to_client_error(error, request) from None

    def check_stream(self, request: WireRequest) -> None:
        """Raises ValueError for a format that HTTP cannot stream."""
        _check_stream(request)

    def stream(self, request: WireRequest) -> AsyncGenerator[Outputs, None]:
        """Send a request and yield its responses; closing the iterator or cancelling the task closes the connection."""
        return self._receive(to_stream_request(request), request)

    async def _receive(self, post: HttpRequest, request: WireRequest) -> AsyncGenerator[Outputs, None]:
        decoder = EventDecoder(request)
        try:
            async with self._post(post, request) as response:
                if response.status != http.client.OK:
                    raise _error(response.status, response.headers, await response.read(), request)
                async for piece in response.content.iter_any():
                    for outputs in decoder.decode_outputs(piece):
                        yield outputs
        except (OSError, aiohttp.ClientError) as error:
            raise self._to_client_error(error, request) from None

    def _post(self, post: HttpRequest, request: WireRequest) -> Any:
        return self._session.post(
            self._base_url + post.path,
            data=post.body,
            headers=post.headers,
            timeout=aiohttp.ClientTimeout(total=request.timeout_s, sock_connect=CONNECTION_TIMEOUT_S),
        )

    def _to_client_error(self, error: Exception, request: WireRequest) -> DiffusionClientError:
        was_connected = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
        return _to_client_error(error, self._connection, request, was_connected=was_connected)

    async def is_ready(self, model: str, timeout_s: float) -> bool:
        """Whether the server and the model are ready. Raises ServerUnavailableError if the server does not say."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            for path in _readiness_paths(model):
                async with self._session.get(self._base_url + path, timeout=timeout) as response:
                    if response.status != http.client.OK:
                        return False
        except (OSError, aiohttp.ClientError) as error:
            raise self._connection.unreachable(error) from None
        return True

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
