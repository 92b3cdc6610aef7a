"""A double of Triton that speaks its gRPC and HTTP protocols on loopback, and callers for every kind of client.

The double answers as the real server was seen to answer; tests/end_to_end asks the real one.
"""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import json
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from tests.client.repository_double import RepositoryDouble
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from triton_diffusion_client import AsyncDiffusionClient, DiffusionClient, Event, Family, GenerationResult

STEP_S = 0.05
INPUTS = {
    "prompt",
    "negative_prompt",
    "image",
    "strength",
    "height",
    "width",
    "num_frames",
    "fps",
    "flow_shift",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "embedded_guidance_scale",
    "seed",
    "num_outputs",
    "max_sequence_length",
    "output_format",
    "output_quality",
    "preview_interval",
    "priority",
    "deadline_s",
    "deadline_action",
}
# Chain: whether it makes videos.
CHAINS = {"diffusion": False, "wan": True}
FAMILIES = [
    {
        "family": "wan",
        "pipeline_class": "WanPipeline",
        "tasks": ["text-to-video", "image-to-video"],
        "parameters": {
            "num_frames": {"default": 81, "min": 1, "max": 161, "description": "one more than a multiple of 4"},
            "output_format": {"default": "b64_mp4", "choices": ["b64_mp4", "mp4"], "description": "of the video"},
            "seed": {"min": 0},
        },
    }
]
DTYPES = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
VIDEO_FILES = {  # beginnings and ends as of real files
    "mp4": b"\x00\x00\x00\x18ftypmp42" + b"frames",
    "webm": b"\x1a\x45\xdf\xa3" + b"frames",
    "gif": b"GIF89a" + b"frames" + b";",
}
ERRORS = {  # prompt: gRPC status, HTTP status, message
    "invalid": ("INVALID_ARGUMENT", 400, "height=7 is not a multiple of 16; use 0 or 16"),
    "too much": ("UNAVAILABLE", 503, "the queue is full; come back later"),
    "crash": ("INTERNAL", 500, "the worker group died"),
    "taken back": ("CANCELLED", 400, "cancelled in denoising after 3 steps"),
    "late": ("DEADLINE_EXCEEDED", 504, "the time-out of 3 s is over"),
    "too late": ("UNAVAILABLE", 503, "DEADLINE_EXCEEDED: deadline_s=3 cannot be met; try again later"),
    "taken back too late": ("CANCELLED", 400, "DEADLINE_EXCEEDED: deadline_s=3 is over; cancelled after 3 steps"),
}


class RequestFailedError(Exception):
    """What a model answers instead of outputs; before_answer: no response was sent before it."""

    def __init__(self, grpc_status: str, http_status: int, message: str, before_answer: bool = True) -> None:
        super().__init__(message)
        self.grpc_status, self.http_status, self.message = grpc_status, http_status, message
        self.before_answer = before_answer


@dataclass
class ReceivedRequest:
    model: str
    id: str
    inputs: dict[str, Any]
    """By tensor name: (Triton data type, shape, value); the value of `image` is the list of its bytes or texts."""
    parameters: dict[str, Any]
    headers: dict[str, str]
    cancelled: threading.Event = field(default_factory=threading.Event)
    """By a caller that went away, or by a model `cancellation`."""
    is_cancelled_by_id: bool = False
    is_done: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What a model `cancellation` finds it by."""
        return self.id, self.parameters.get("cancel_scope", "")

    def value(self, name: str, default: Any = None) -> Any:
        return self.inputs[name][2] if name in self.inputs else default


class TritonDouble:
    """The models of the chains `diffusion` (pictures) and `wan` (videos); a prompt decides what its request gets."""

    def __init__(
        self,
        private_key: Path | None = None,
        certificate: Path | None = None,
        *,
        grpc_port: int = 0,
        http_port: int = 0,
    ) -> None:
        self.refusals: list[tuple[str, int, str]] = []
        """gRPC status, HTTP status and message of the answers to the next requests."""
        self.num_breaks = 0
        """How many of the next requests fail after their first step, in the words of a stage that goes away."""
        self.admin_key: str | None = None
        """What opens the repository, if it is closed."""
        self.health: Any = {"ready": True, "stages": {}}
        self.received: list[ReceivedRequest] = []
        self.is_ready = True
        self.repository = RepositoryDouble()
        self.http_connections: list[socket.socket] = []
        self._grpc_server = grpc.server(ThreadPoolExecutor(32))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_GrpcService(self), self._grpc_server)
        if private_key is not None and certificate is not None:
            credentials = grpc.ssl_server_credentials([(private_key.read_bytes(), certificate.read_bytes())])
            grpc_port = self._grpc_server.add_secure_port(f"127.0.0.1:{grpc_port}", credentials)
        else:
            grpc_port = self._grpc_server.add_insecure_port(f"127.0.0.1:{grpc_port}")
        self.grpc_url = f"127.0.0.1:{grpc_port}"
        self._grpc_server.start()
        self._http_server = _HttpServer(("127.0.0.1", http_port), _HttpHandler)
        self._http_server.double = self
        if private_key is not None and certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, private_key)
            self._http_server.socket = context.wrap_socket(self._http_server.socket, server_side=True)
        self.http_url = f"127.0.0.1:{self._http_server.server_port}"
        threading.Thread(target=self._http_server.serve_forever, args=(0.05,), daemon=True).start()

    def die(self) -> None:
        """Cut every connection in the middle of what is under way."""
        self._grpc_server.stop(None)
        for connection in self.http_connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self._grpc_server.stop(None).wait()
        self._http_server.shutdown()
        self._http_server.server_close()

    def run(self, request: ReceivedRequest) -> Iterator[dict[str, np.ndarray]]:
        """The responses of a model; a model that answers once gives the last."""
        self.received.append(request)
        try:
            if request.model in ("cancellation", "wan_cancellation"):
                yield {"cancelled": np.array([self._cancel(request)])}
            elif request.model in ("health", "wan_health"):
                yield {"health": _text(json.dumps(self.health))}
            elif request.model in ("families", "wan_families"):
                name = request.value("name")
                yield {"families": _text(json.dumps([f for f in FAMILIES if name in (None, f["family"])]))}
            else:
                yield from self._draw(request)
        finally:
            request.is_done = True

    def _cancel(self, request: ReceivedRequest) -> bool:
        key = request.value("request_id"), request.parameters.get("cancel_scope", "")
        found = [other for other in self.received if other.key == key and not other.is_done]
        for other in found:
            other.is_cancelled_by_id = True
            other.cancelled.set()
        return bool(found)

    def _draw(self, request: ReceivedRequest) -> Iterator[dict[str, np.ndarray]]:
        if request.model.removesuffix("_stream") not in CHAINS:
            message = f"Request for unknown model: '{request.model}' is not found"
            raise RequestFailedError("NOT_FOUND", 404, message)
        prompt = request.value("prompt")
        if self.refusals:
            raise RequestFailedError(*self.refusals.pop(0))
        if prompt in ERRORS:
            raise RequestFailedError(*ERRORS[prompt])
        steps = request.value("num_inference_steps", 3)
        for step in range(1, steps + 1):
            if request.cancelled.wait(STEP_S if prompt == "slow" else 0):
                if request.is_cancelled_by_id:
                    raise RequestFailedError("CANCELLED", 400, f"cancelled in denoising after {step - 1} steps")
                return
            if request.model.endswith("_stream"):
                yield self._progress(request, step, steps)
            if self.num_breaks and step == 2:
                self.num_breaks -= 1
                raise RequestFailedError("UNAVAILABLE", 503, "denoising is being unloaded; try again", False)
            if prompt == "midway" and step == 2:
                raise RequestFailedError("INTERNAL", 500, "the worker group died", before_answer=False)
            if prompt == "midway too late" and step == 2:
                message = "DEADLINE_EXCEEDED: deadline_s=3 cannot be met any more"
                raise RequestFailedError("UNAVAILABLE", 503, message)
        if prompt == "nothing":
            return
        yield self._result(request)

    def run_to_the_end(self, request: ReceivedRequest) -> dict[str, np.ndarray]:
        """The last response of a model, empty if there is none."""
        responses = list(self.run(request))
        return responses[-1] if responses else {}

    def _progress(self, request: ReceivedRequest, step: int, steps: int) -> dict[str, np.ndarray]:
        progress = {"stage": "denoising", "step": step, "total": steps, "elapsed_s": step * STEP_S}
        progress["remaining_s"] = None if step == 1 else (steps - step) * STEP_S
        outputs = {"progress": _text(json.dumps(progress))}
        interval = request.value("preview_interval", 0)
        if interval and step % interval == 0:
            outputs["preview_image"] = _pictures(request)
        return outputs

    def _result(self, request: ReceivedRequest) -> dict[str, np.ndarray]:
        timings = {
            "request_id": request.id,
            "total_s": 1.5,
            "queue_s": 0.25,
            "stages_s": {"text_encoding": 0.25, "denoising": 1.0},
            "steps_s": [0.5, 0.5],
            "warnings": ["guidance_scale has no effect"] if request.value("guidance_scale") else [],
        }
        num_outputs, seed = request.value("num_outputs", 1), request.value("seed", 7)
        outputs = {
            "seed": np.arange(seed, seed + num_outputs, dtype=np.int64),
            "timings": _text(json.dumps(timings)),
        }
        is_raw = request.value("output_format") == "raw"
        if CHAINS[request.model.removesuffix("_stream")]:
            video = {"raw_video": _frames(num_outputs)} if is_raw else {"generated_video": _videos(request)}
            return outputs | video
        return outputs | ({"raw_image": _pixels(num_outputs)} if is_raw else {"generated_image": _pictures(request)})


def _text(text: str) -> np.ndarray:
    return np.array([text.encode()], dtype=np.object_)


def _pixels(num_outputs: int) -> np.ndarray:
    """Each picture of a colour of its own, 8 high and 16 wide."""
    colours = np.arange(num_outputs, dtype=np.uint8)[:, None, None, None]
    return np.tile(colours, (1, 8, 16, 3))


def _frames(num_outputs: int) -> np.ndarray:
    """Videos of two frames: the picture, and another that is brighter by 100."""
    pixels = _pixels(num_outputs)
    return np.stack([pixels, pixels + 100], axis=1)


def _pictures(request: ReceivedRequest) -> np.ndarray:
    output_format = request.value("output_format", "b64_png")
    if output_format.removeprefix("b64_") in VIDEO_FILES:  # the previews of a video are pictures
        output_format = "b64_png" if output_format.startswith("b64_") else "png"
    files = []
    for pixels in _pixels(request.value("num_outputs", 1)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, output_format.removeprefix("b64_"))
        files.append(buffer.getvalue())
    return _as_asked(files, output_format)


def _videos(request: ReceivedRequest) -> np.ndarray:
    output_format = request.value("output_format", "b64_mp4")
    file = VIDEO_FILES[output_format.removeprefix("b64_")]
    return _as_asked([file] * request.value("num_outputs", 1), output_format)


def _as_asked(files: list[bytes], output_format: str) -> np.ndarray:
    is_text = output_format.startswith("b64_")
    return np.array([base64.b64encode(file) if is_text else file for file in files], dtype=np.object_)


def _read_tensor(name: str, datatype: str, content: bytes) -> Any:
    if name == "image":
        return list(deserialize_bytes_tensor(content))
    if datatype == "BYTES":
        return deserialize_bytes_tensor(content)[0].decode()
    return np.frombuffer(content, DTYPES[datatype])[0].item()


class _GrpcService(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, double: TritonDouble) -> None:
        self._double = double

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self._double.is_ready)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name == "diffusion")

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._require_key(context)
        models = [service_pb2.RepositoryIndexResponse.ModelIndex(**entry) for entry in self._double.repository.index()]
        return service_pb2.RepositoryIndexResponse(models=models)

    def RepositoryModelLoad(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._control("load", request.model_name, context)
        return service_pb2.RepositoryModelLoadResponse()

    def RepositoryModelUnload(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._control("unload", request.model_name, context)
        return service_pb2.RepositoryModelUnloadResponse()

    def _require_key(self, context: grpc.ServicerContext) -> None:
        key, header = self._double.admin_key, "triton-grpc-protocol-triton-diffusion-admin-key"
        if key is not None and dict(context.invocation_metadata()).get(header) != key:
            message = f"This protocol is restricted, expecting header '{header}'"
            context.abort(grpc.StatusCode.UNAVAILABLE, message)

    def _control(self, verb: str, model: str, context: grpc.ServicerContext) -> None:
        if (error := self._double.repository.control(verb, model)) is not None:
            context.abort(getattr(grpc.StatusCode, error.grpc_status), error.message)

    def ModelInfer(self, message: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        request = self._read(message, context)
        try:
            outputs = self._double.run_to_the_end(request)
        except RequestFailedError as error:
            context.abort(getattr(grpc.StatusCode, error.grpc_status), error.message)
        return _to_message(message, outputs)

    def ModelStreamInfer(self, messages: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        for message in messages:
            request = self._read(message, context)
            try:
                for outputs in self._double.run(request):
                    yield service_pb2.ModelStreamInferResponse(infer_response=_to_message(message, outputs))
            except RequestFailedError as error:
                if request.headers.get("triton_grpc_error") == "true" and error.grpc_status != "NOT_FOUND":
                    context.abort(getattr(grpc.StatusCode, error.grpc_status), error.message)
                yield service_pb2.ModelStreamInferResponse(error_message=error.message)

    def _read(self, message: Any, context: grpc.ServicerContext) -> ReceivedRequest:
        inputs = {}
        for tensor, content in zip(message.inputs, message.raw_input_contents, strict=True):
            value = _read_tensor(tensor.name, tensor.datatype, content)
            inputs[tensor.name] = (tensor.datatype, list(tensor.shape), value)
        parameters = {
            name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in message.parameters.items()
        }
        headers = dict(context.invocation_metadata())
        request = ReceivedRequest(message.model_name, message.id, inputs, parameters, headers)
        context.add_callback(request.cancelled.set)
        return request


def _to_message(message: Any, outputs: dict[str, np.ndarray]) -> Any:
    response = service_pb2.ModelInferResponse(model_name=message.model_name, id=message.id)
    for name, tensor in outputs.items():
        datatype, content = _encode(tensor)
        response.outputs.add(name=name, datatype=datatype, shape=list(tensor.shape))
        response.raw_output_contents.append(content)
    return response


def _encode(tensor: np.ndarray) -> tuple[str, bytes]:
    if tensor.dtype == np.object_:
        return "BYTES", serialize_byte_tensor(tensor).item()
    return {"uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}[tensor.dtype.name], tensor.tobytes()


class _HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    double: TritonDouble

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a connection that is cut is what some tests are about."""


class _HttpHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HttpServer

    def setup(self) -> None:
        super().setup()
        self.server.double.http_connections.append(self.connection)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        ready = {"/v2/health/ready": self.server.double.is_ready, "/v2/models/diffusion/ready": True}.get(
            self.path, False
        )
        self._answer(200 if ready else 400, b"")

    def do_POST(self) -> None:
        double = self.server.double
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/v2/repository/"):
            if double.admin_key not in (None, self.headers["triton-diffusion-admin-key"]):
                message = "This API is restricted, expecting header 'triton-diffusion-admin-key'"
                self._answer(403, json.dumps({"error": message}).encode())
                return
            self._control(double.repository)
            return
        _, _, _, model, verb = self.path.split("/")
        if verb == "infer":
            self._infer(double, self._read_binary(model, body))
        else:
            self._generate_stream(double, self._read_json(model, body))

    def _control(self, repository: RepositoryDouble) -> None:
        if self.path.endswith("/index"):
            self._answer(200, json.dumps(repository.index()).encode())
        elif (error := repository.control(self.path.split("/")[-1], self.path.split("/")[-2])) is not None:
            self._answer(error.http_status, json.dumps({"error": error.message}).encode())
        else:
            self._answer(200, b"")

    def _infer(self, double: TritonDouble, request: ReceivedRequest) -> None:
        try:
            outputs = double.run_to_the_end(request)
        except RequestFailedError as error:
            self._answer(error.http_status, json.dumps({"error": error.message}).encode())
            return
        described, contents = [], []
        for name, tensor in outputs.items():
            datatype, content = _encode(tensor)
            parameters = {"binary_data_size": len(content)}
            described.append(
                {"name": name, "datatype": datatype, "shape": list(tensor.shape), "parameters": parameters}
            )
            contents.append(content)
        head = json.dumps({"model_name": request.model, "outputs": described}).encode()
        self._answer(200, head + b"".join(contents), {"Inference-Header-Content-Length": str(len(head))})

    def _generate_stream(self, double: TritonDouble, request: ReceivedRequest) -> None:
        """Triton answers the first error of a model as 400, whatever it is, and a later one in an event under 200."""
        started = False
        try:
            for outputs in double.run(request):
                if not started:
                    self._start_events(200)
                started = True
                self._send_event({name: _to_json(tensor) for name, tensor in outputs.items()})
        except RequestFailedError as error:
            if error.http_status == 404:
                self._answer(404, json.dumps({"error": error.message}).encode())
                return
            if not started:
                self._start_events(400)
            started = True
            self._send_event({"error": error.message})
        except OSError:
            request.cancelled.set()
            self.close_connection = True
            return
        if not started:
            self._start_events(200)
        self.wfile.write(b"0\r\n\r\n")

    def _start_events(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _send_event(self, event: dict[str, Any]) -> None:
        """In two chunks: an event may arrive in pieces."""
        content = f"data: {json.dumps(event)}\n\n".encode()
        middle = len(content) // 2
        for piece in (content[:middle], content[middle:]):
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.flush()

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _read_binary(self, model: str, body: bytes) -> ReceivedRequest:
        head_length = int(self.headers.get("Inference-Header-Content-Length", len(body)))
        head, rest = json.loads(body[:head_length]), body[head_length:]
        inputs = {}
        for tensor in head["inputs"]:
            size = tensor["parameters"]["binary_data_size"]
            content, rest = rest[:size], rest[size:]
            value = _read_tensor(tensor["name"], tensor["datatype"], content)
            inputs[tensor["name"]] = (tensor["datatype"], tensor["shape"], value)
        headers = {name.lower(): value for name, value in self.headers.items()}
        return ReceivedRequest(model, head["id"], inputs, head.get("parameters", {}), headers)

    def _read_json(self, model: str, body: bytes) -> ReceivedRequest:
        fields = json.loads(body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request_id = fields.pop("id")
        shapes = {name: [len(value)] if name == "image" else [1] for name, value in fields.items()}
        inputs = {name: (None, shapes[name], value) for name, value in fields.items() if name in INPUTS}
        parameters = {name: value for name, value in fields.items() if name not in INPUTS}
        return ReceivedRequest(model, request_id, inputs, parameters, headers)


def _to_json(tensor: np.ndarray) -> Any:
    values = [value.decode() if isinstance(value, bytes) else value for value in tensor.reshape(-1).tolist()]
    return values[0] if len(values) == 1 else values


class Caller:
    """One kind of client (blocking or asyncio, gRPC or HTTP) behind one blocking face.

    It sends nothing again unless the client is told to.
    """

    def __init__(self, is_async: bool, protocol: Any, url: str) -> None:
        self.is_async, self.protocol, self.url = is_async, protocol, url

    def generate(self, prompt: str, *, client: dict[str, Any] | None = None, **options: Any) -> GenerationResult:
        if not self.is_async:
            with DiffusionClient(self.url, self.protocol, **{"retries": 0, **(client or {})}) as blocking:
                return blocking.generate(prompt, **options)

        async def run() -> GenerationResult:
            async with AsyncDiffusionClient(
                self.url, self.protocol, **{"retries": 0, **(client or {})}
            ) as asynchronous:
                return await asynchronous.generate(prompt, **options)

        return asyncio.run(run())

    def stream(self, prompt: str, *, client: dict[str, Any] | None = None, **options: Any) -> list[Event]:
        if not self.is_async:
            with DiffusionClient(self.url, self.protocol, **{"retries": 0, **(client or {})}) as blocking:
                return list(blocking.stream(prompt, **options))

        async def run() -> list[Event]:
            async with AsyncDiffusionClient(
                self.url, self.protocol, **{"retries": 0, **(client or {})}
            ) as asynchronous:
                return [event async for event in asynchronous.stream(prompt, **options)]

        return asyncio.run(run())

    def cancel(self, request_id: str, **client: Any) -> bool:
        if not self.is_async:
            with DiffusionClient(self.url, self.protocol, retries=0, **client) as blocking:
                return blocking.cancel(request_id)

        async def run() -> bool:
            async with AsyncDiffusionClient(self.url, self.protocol, retries=0, **client) as asynchronous:
                return await asynchronous.cancel(request_id)

        return asyncio.run(run())

    def families(self, name: str | None = None, **client: Any) -> tuple[Family, ...]:
        if not self.is_async:
            with DiffusionClient(self.url, self.protocol, retries=0, **client) as blocking:
                return blocking.families(name)

        async def run() -> tuple[Family, ...]:
            async with AsyncDiffusionClient(self.url, self.protocol, retries=0, **client) as asynchronous:
                return await asynchronous.families(name)

        return asyncio.run(run())

    def close_stream_after(self, num_events: int, prompt: str, **options: Any) -> None:
        """Read some events, close the stream, and only then the client: after a second."""
        if not self.is_async:
            with DiffusionClient(self.url, self.protocol, retries=0) as blocking:
                events = blocking.stream(prompt, **options)
                for _ in range(num_events):
                    next(events)
                events.close()
                time.sleep(1)
            return

        async def run() -> None:
            async with AsyncDiffusionClient(self.url, self.protocol, retries=0) as asynchronous:
                async with aclosing(asynchronous.stream(prompt, **options)) as events:
                    for _ in range(num_events):
                        await anext(events)
                await asyncio.sleep(1)

        asyncio.run(run())

    def is_ready(self, **client: Any) -> bool:
        if not self.is_async:
            with DiffusionClient(self.url, self.protocol, retries=0, **client) as blocking:
                return blocking.is_ready()

        async def run() -> bool:
            async with AsyncDiffusionClient(self.url, self.protocol, retries=0, **client) as asynchronous:
                return await asynchronous.is_ready()

        return asyncio.run(run())

    def wait_until_ready(self, timeout_s: float) -> None:
        if not self.is_async:
            with DiffusionClient(self.url, self.protocol, retries=0) as blocking:
                return blocking.wait_until_ready(timeout_s)

        async def run() -> None:
            async with AsyncDiffusionClient(self.url, self.protocol, retries=0) as asynchronous:
                await asynchronous.wait_until_ready(timeout_s)

        return asyncio.run(run())


CALLERS = [(is_async, protocol) for is_async in (False, True) for protocol in ("grpc", "http")]


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Processes started within heed SIGINT, also where the tests do not: what a shell starts with `&` ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _the_drawn_seed_is_7(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files and expected values can then tell it."""
    monkeypatch.setattr("triton_diffusion_client._protocol.secrets.randbelow", lambda _: 7)


@pytest.fixture
def triton() -> Iterator[TritonDouble]:
    double = TritonDouble()
    yield double
    with suppress(OSError):
        double.stop()


@pytest.fixture(params=CALLERS, ids=lambda param: f"{'async' if param[0] else 'blocking'}-{param[1]}")
def caller(request: pytest.FixtureRequest, triton: TritonDouble) -> Caller:
    is_async, protocol = request.param
    return Caller(is_async, protocol, triton.grpc_url if protocol == "grpc" else triton.http_url)
