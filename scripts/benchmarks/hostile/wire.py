"""Requests as bytes: what tritonclient would refuse to send, too."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from benchmarks.hostile.answers import Answer, http_answer

TIMEOUT_S = 90.0
"""No request here needs a second; one that takes so long is taken for lost."""
LOST = "no answer"
_SERVICE = "/inference.GRPCInferenceService/"


@dataclass(frozen=True)
class RawTensor:
    """A tensor whose parts need not agree."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: bytes


@dataclass(frozen=True)
class RawRequest:
    """An inference request in the terms that HTTP and gRPC share."""

    tensors: Sequence[RawTensor]
    model: str = "diffusion"
    request_id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] = ()

    def to_http(self) -> tuple[bytes, bytes]:
        """JSON header and the tensors' bytes behind it."""
        inputs = [
            {
                "name": each.name,
                "datatype": each.datatype,
                "shape": list(each.shape),
                "parameters": {"binary_data_size": len(each.data)},
            }
            for each in self.tensors
        ]
        header: dict[str, Any] = {"inputs": inputs, "parameters": {"binary_data_output": True} | self.parameters}
        if self.request_id:
            header["id"] = self.request_id
        if self.outputs:
            header["outputs"] = [{"name": name} for name in self.outputs]
        return json.dumps(header).encode(), b"".join(each.data for each in self.tensors)

    def to_grpc(self) -> bytes:
        """A ModelInferRequest."""
        message = service_pb2.ModelInferRequest(model_name=self.model, id=_writable(self.request_id))
        for each in self.tensors:
            made = message.inputs.add(name=_writable(each.name), datatype=_writable(each.datatype))
            made.shape.extend(max(-(2**63), min(2**63 - 1, size)) for size in each.shape)
            message.raw_input_contents.append(each.data)
        for name in self.outputs:
            message.outputs.add(name=_writable(name))
        for name, value in self.parameters.items():
            kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
            setattr(message.parameters[name], kind, value)
        return bytes(message.SerializeToString())


def _writable(text: str) -> str:
    """Protobuf takes no lone surrogates."""
    return text.encode(errors="replace").decode()


def bytes_elements(values: Iterable[bytes]) -> bytes:
    """The elements of a BYTES tensor, each behind its length."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


class Connection:
    """One client's connections to a server, over HTTP and gRPC."""

    def __init__(self, http_address: str, grpc_address: str, server_pid: int) -> None:
        self.http_address = http_address
        self.server_pid = server_pid
        self._grpc_address = grpc_address
        self._channel = self._open()
        self._http: http.client.HTTPConnection | None = None

    def _open(self) -> grpc.Channel:
        # Channels with equal options would share one connection, and one that is broken would break them all.
        own = ("grpc.use_local_subchannel_pool", 1)
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        return grpc.insecure_channel(self._grpc_address, [own, *unlimited])

    def close(self) -> None:
        """Close both."""
        self._channel.close()
        if self._http is not None:
            self._http.close()

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> Answer:
        """Send a well-formed HTTP request."""
        for is_last in (False, True):
            try:
                if self._http is None:
                    self._http = http.client.HTTPConnection(self.http_address, timeout=TIMEOUT_S)
                self._http.request(method, path, body, headers or {})
                response = self._http.getresponse()
                return http_answer(response.status, response.read())
            except TimeoutError:
                self._http = None
                return Answer(LOST)
            except (OSError, http.client.HTTPException):
                # The server may close a connection that was idle, or one on which it could not read a request.
                self._http = None
                if is_last:
                    return Answer("closed")
        raise AssertionError

    def infer_http(self, request: RawRequest, action: str = "infer") -> Answer:
        """A request with its tensors as binary data."""
        header, data = request.to_http()
        headers = {"Inference-Header-Content-Length": str(len(header))}
        return self.post(f"/v2/models/{request.model}/{action}", header + data, headers)

    def infer_grpc(self, request: RawRequest) -> Answer:
        """A unary call."""
        return self.call("ModelInfer", request.to_grpc())

    def stream_grpc(self, request: RawRequest) -> Answer:
        """A call of ModelStreamInfer, read to its end; two seconds of silence are its end, too."""
        stream = self._channel.stream_stream(f"{_SERVICE}ModelStreamInfer")
        answer = Answer("OK")
        try:
            for data in stream(iter([request.to_grpc()]), timeout=TIMEOUT_S):
                error = service_pb2.ModelStreamInferResponse.FromString(data).error_message
                answer = Answer("error in a stream", error) if error else answer
        except grpc.RpcError as error:
            return _of_code(error)
        return answer

    def call(self, method: str, data: bytes, *, timeout_s: float = TIMEOUT_S) -> Answer:
        """A unary call with these bytes as its message."""
        try:
            self._channel.unary_unary(f"{_SERVICE}{method}")(data, timeout=timeout_s)
        except grpc.RpcError as error:
            return _of_code(error) if timeout_s == TIMEOUT_S else Answer("went away")
        except ValueError:  # The channel was closed.
            return Answer("closed")
        return Answer("OK")

    def picture(self, request: RawRequest) -> bytes:
        """The first output of a good request; raises grpc.RpcError."""
        data = self._channel.unary_unary(f"{_SERVICE}ModelInfer")(request.to_grpc(), timeout=TIMEOUT_S)
        response = service_pb2.ModelInferResponse.FromString(data)
        names = [output.name for output in response.outputs]
        return bytes(response.raw_output_contents[names.index("raw_image")])

    def start_and_leave(self, request: RawRequest, *, after: int) -> Answer:
        """Begin a stream and cancel it after so many messages."""
        stream = self._channel.stream_stream(f"{_SERVICE}ModelStreamInfer")
        call = stream(iter([request.to_grpc()]), timeout=TIMEOUT_S)
        with contextlib.suppress(grpc.RpcError):
            for _ in itertools.islice(call, after):
                pass
        call.cancel()
        return Answer("went away")


def _of_code(error: grpc.RpcError) -> Answer:
    code = error.code().name
    return Answer(LOST if code == "DEADLINE_EXCEEDED" else code, error.details() or "")
