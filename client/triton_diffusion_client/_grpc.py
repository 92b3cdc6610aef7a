"""Requests over gRPC, with the stubs and data classes of tritonclient.

A cancel, a time-out and a lost connection all end the call, and the server sees that at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

import grpc
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from tritonclient.utils import serialize_byte_tensor

from triton_diffusion_client._answers import ModelState, Outputs
from triton_diffusion_client._connection import CONNECTION_TIMEOUT_S, Connection
from triton_diffusion_client._protocol import WireRequest
from triton_diffusion_client.errors import (
    DiffusionClientError,
    InvalidRequestError,
    RequestTimeoutError,
    error_from_message,
    error_from_status,
    is_from_a_model,
)

_CHANNEL_OPTIONS = [
    # Raw pictures are large: no limit on either side.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that has come back is found within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Despite its name, this is how long a server may take to accept a connection.
    ("grpc.min_reconnect_backoff_ms", int(CONNECTION_TIMEOUT_S * 1000)),
]

# Without it Triton reports an error in a stream as a message without a status.
_STREAM_METADATA = (("triton_grpc_error", "true"),)

# How gRPC itself complains about the connection; anything else that is UNAVAILABLE comes from the server.
_NO_CONNECTION = (
    "failed to connect",
    "connections to all backends failing",
    "dns resolution failed",
    "errors resolving",
    "handshake failed",
)
_BROKEN_CONNECTION = ("socket closed", "connection reset", "broken pipe", "recvmsg", "goaway")


def to_infer_request(request: WireRequest) -> service_pb2.ModelInferRequest:
    """The message of the KServe protocol for a request."""
    message = service_pb2.ModelInferRequest(model_name=request.model, id=request.request_id)
    if request.timeout_s is not None:
        message.parameters["timeout"].int64_param = int(request.timeout_s * 1e6)
    for name, value in request.parameters.items():
        message.parameters[name].string_param = value
    for name, datatype, content in request.tensors():
        message.inputs.add(name=name, datatype=datatype, shape=list(content.shape))
        message.raw_input_contents.append(
            serialize_byte_tensor(content).item() if datatype == "BYTES" else content.tobytes()
        )
    return message


def to_client_error(
    error: grpc.RpcError, connection: Connection, request: WireRequest | None = None
) -> DiffusionClientError:
    """Our exception for an error that gRPC raised."""
    status, message = error.code().name, error.details() or ""
    request_id = None if request is None else request.request_id
    if is_from_a_model(message):
        return error_from_status(status, message, request_id)
    if status == "UNAVAILABLE":
        # The first may quote one of the second as its reason.
        for complaints, was_connected in ((_NO_CONNECTION, False), (_BROKEN_CONNECTION, True)):
            if any(complaint in message.lower() for complaint in complaints):
                return connection.unreachable(message, request_id, was_connected=was_connected)
    if status == "DEADLINE_EXCEEDED" and request is not None and request.timeout_s is not None:
        return RequestTimeoutError(
            f"no answer within timeout_s={request.timeout_s:g}; the request was cancelled",
            status=status,
            request_id=request_id,
        )
    return error_from_status(status, message, request_id)


def read_stream_response(response: service_pb2.ModelStreamInferResponse, request: WireRequest) -> Outputs:
    """The outputs in one response of a stream, or raise the error in it.

    Only what Triton refuses before the model sees it still comes as a message without a status.
    """
    if response.error_message:
        raise error_from_message(response.error_message, InvalidRequestError, request.request_id)
    outputs: Outputs = InferResult(response.infer_response)
    return outputs


def _credentials(connection: Connection) -> grpc.ChannelCredentials:
    files = (connection.root_certificates, connection.private_key, connection.certificate_chain)
    return grpc.ssl_channel_credentials(*(None if file is None else file.read_bytes() for file in files))


def _metadata(connection: Connection) -> tuple[tuple[str, str], ...]:
    return tuple((name.lower(), value) for name, value in connection.headers.items())


class GrpcTransport:
    """Blocking requests over one channel, which any number of threads may use."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        if connection.ssl:
            self._channel = grpc.secure_channel(connection.address, _credentials(connection), _CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(connection.address, _CHANNEL_OPTIONS)
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._metadata = _metadata(connection)

    def infer(self, request: WireRequest) -> Outputs:
        """Send a request and wait for its one response."""
        call = self._stub.ModelInfer.future(
            to_infer_request(request), timeout=request.timeout_s, metadata=self._metadata
        )
        try:
            outputs: Outputs = InferResult(call.result())
            return outputs
        except grpc.RpcError as error:
            raise to_client_error(error, self._connection, request) from None
        finally:
            call.cancel()  # on KeyboardInterrupt; without effect once the call has ended

    def check_stream(self, request: WireRequest) -> None:
        """Nothing to check: gRPC carries every format."""

    def stream(self, request: WireRequest) -> Generator[Outputs, None, None]:
        """Send a request and yield its responses; closing the iterator cancels it."""
        call = self._stub.ModelStreamInfer(
            iter([to_infer_request(request)]),
            timeout=request.timeout_s,
            metadata=self._metadata + _STREAM_METADATA,
        )
        try:
            for response in call:
                yield read_stream_response(response, request)
        except grpc.RpcError as error:
            raise to_client_error(error, self._connection, request) from None
        finally:
            call.cancel()

    def list_models(self, request: WireRequest) -> list[ModelState]:
        """The models in the server's repository, loaded or not; the request names none."""
        answer = self._control(self._stub.RepositoryIndex, service_pb2.RepositoryIndexRequest(), request)
        return [ModelState(entry.name, entry.state) for entry in answer.models]

    def load_model(self, request: WireRequest) -> None:
        """Load a model; returns when it is ready."""
        message = service_pb2.RepositoryModelLoadRequest(model_name=request.model)
        self._control(self._stub.RepositoryModelLoad, message, request)

    def unload_model(self, request: WireRequest) -> None:
        """Ask the server to unload a model; it does so once the model's requests are done."""
        message = service_pb2.RepositoryModelUnloadRequest(model_name=request.model)
        self._control(self._stub.RepositoryModelUnload, message, request)

    def _control(self, call: Any, message: Any, request: WireRequest) -> Any:
        try:
            return call(message, timeout=request.timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_client_error(error, self._connection, request) from None

    def is_ready(self, model: str, timeout_s: float) -> bool:
        """Whether the server and the model are ready. Raises DiffusionClientError if the server does not say."""
        options: dict[str, Any] = {"timeout": timeout_s, "metadata": self._metadata}
        try:
            return bool(
                self._stub.ServerReady(service_pb2.ServerReadyRequest(), **options).ready
                and self._stub.ModelReady(service_pb2.ModelReadyRequest(name=model), **options).ready
            )
        except grpc.RpcError as error:
            raise to_client_error(error, self._connection) from None

    def close(self) -> None:
        """End all calls and the connection."""
        self._channel.close()


class AsyncGrpcTransport:
    """The same for asyncio; made and used inside one event loop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        if connection.ssl:
            credentials = _credentials(connection)
            self._channel = grpc.aio.secure_channel(connection.address, credentials, _CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(connection.address, _CHANNEL_OPTIONS)
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._metadata = _metadata(connection)

    async def infer(self, request: WireRequest) -> Outputs:
        """Send a request and wait for its one response; cancelling the task cancels it."""
        call = self._stub.ModelInfer(to_infer_request(request), timeout=request.timeout_s, metadata=self._metadata)
        try:
            outputs: Outputs = InferResult(await call)
            return outputs
        except grpc.RpcError as error:
            raise to_client_error(error, self._connection, request) from None
        finally:
            call.cancel()

    def check_stream(self, request: WireRequest) -> None:
        """Nothing to check: gRPC carries every format."""

    async def stream(self, request: WireRequest) -> AsyncGenerator[Outputs, None]:
        """Send a request and yield its responses; closing the iterator or cancelling the task cancels it."""
        call = self._stub.ModelStreamInfer(
            iter([to_infer_request(request)]),
            timeout=request.timeout_s,
            metadata=self._metadata + _STREAM_METADATA,
        )
        try:
            async for response in call:
                yield read_stream_response(response, request)
        except grpc.RpcError as error:
            raise to_client_error(error, self._connection, request) from None
        finally:
            call.cancel()

    async def is_ready(self, model: str, timeout_s: float) -> bool:
        """Whether the server and the model are ready. Raises DiffusionClientError if the server does not say."""
        options: dict[str, Any] = {"timeout": timeout_s, "metadata": self._metadata}
        try:
            server = await self._stub.ServerReady(service_pb2.ServerReadyRequest(), **options)
            return bool(
                server.ready
                and (await self._stub.ModelReady(service_pb2.ModelReadyRequest(name=model), **options)).ready
            )
        except grpc.RpcError as error:
            raise to_client_error(error, self._connection) from None

    async def close(self) -> None:
        """End all calls and the connection."""
        await self._channel.close()
