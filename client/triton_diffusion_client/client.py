"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from triton_diffusion_client._answers import (
    EventReader,
    Outputs,
    missing_result,
    read_cancelled,
    read_families,
    read_health,
    read_result,
)
from triton_diffusion_client._base import (
    NOT_READY_ERRORS,
    READINESS_POLL_S,
    READINESS_TIMEOUT_S,
    BaseClient,
)
from triton_diffusion_client._connection import Connection
from triton_diffusion_client._protocol import GenerationOptions, StreamOptions, WireRequest
from triton_diffusion_client._retries import Attempts
from triton_diffusion_client.errors import DiffusionClientError
from triton_diffusion_client.families import Family
from triton_diffusion_client.health import Health
from triton_diffusion_client.results import Event, GenerationResult

if TYPE_CHECKING:
    from triton_diffusion_client._grpc import GrpcTransport
    from triton_diffusion_client._http import HttpTransport


class DiffusionClient(BaseClient):
    """Asks a Triton server for pictures and videos. One client serves any number of threads at the same time.

        with DiffusionClient("gpu-server:8001") as client:
            client.generate("a red circle", seed=1).images[0].save("circle.png")

    url: host:port of the server's gRPC port (default 127.0.0.1:8001) or HTTP port (default 127.0.0.1:8000).
    protocol: "grpc", or "http" where only that gets through: HTTP streams carry no raw pixels, and Triton sees that a
        client went away only when it next writes to it.
    model: the name of the chain that serves the checkpoint. Its other models are named after it: `<model>_stream`
        sends progress and previews first, `<model>_cancellation` and `<model>_families` are those of `cancel` and
        `families` (of the chain "diffusion": "cancellation", "families").
    stream_model, cancellation_model: in place of these names.
    cancel_scope: goes with every request; a cancel finds only requests of its own scope. None: a random secret, so
        that nobody else can cancel this client's requests. Empty: the scope of all requests that name none.
    timeout_s: longest wait for a whole request, unless the request says otherwise; None: as long as it takes.
    retries, retry_timeout_s: a request that finds the server starting, restarting, draining or full, or cannot reach
        it, is sent again up to `retries` times, after pauses that grow and last at most `retry_timeout_s` seconds in
        all; 0: not once. It keeps its seed, so it draws the same picture, and its `timeout_s` and `deadline_s` count
        from the first attempt. The logger "triton_diffusion_client" warns of each. Nothing else that fails is sent
        again, and neither are `cancel` and `health`.
    connect_timeout_s: seconds after which a request is given up while this client has never been connected to a
        server: a wrong address is then known sooner. None: not sooner, for programs that may start before their
        server. The command line has 5.
    headers: sent with every request (gRPC: as metadata), for an authorization for example.
    ssl, root_certificates, private_key, certificate_chain: as in tritonclient; the last three name PEM files.
    """

    def _prepare_transport(self) -> None:
        self._transport = open_transport(self._connection)

    def generate(self, prompt: str, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Make pictures or a video of `prompt` and wait for them.

        Ctrl-C and the time-out cancel the request on the server; over HTTP the server may notice only when it is done.
        Raises DiffusionClientError; TypeError or ValueError for an argument that cannot be sent, OSError for an `image`
        whose file cannot be read.
        """
        request = self._build_request(prompt, options)
        return read_result(self._infer(request), request)

    def stream(self, prompt: str, **options: Unpack[StreamOptions]) -> Generator[Event, None, None]:
        """As `generate`, but yields Progress and Preview while the server works, and GenerationResult at the end.

        The request is sent when the first event is asked for. Leaving the loop early, `close()`, Ctrl-C and the
        time-out cancel it on the server. A stream that breaks is started anew: the next Progress has one more of
        `restarts`, and its `step` may be lower. Raises as `generate` does.
        """
        request = self._build_stream_request(prompt, options)
        self._transport.check_stream(request)
        return self._read_stream(request)

    def _read_stream(self, request: WireRequest) -> Generator[Event, None, None]:
        with self._attempts(request, threading.Event()) as attempts:
            while True:
                try:
                    responses = self._transport.stream(attempts.next_request())
                    reader = EventReader(request, restarts=attempts.num_failed)
                    with closing(responses):
                        for outputs in responses:
                            for event in reader.read(outputs):
                                yield event
                                if isinstance(event, GenerationResult):
                                    return
                    raise missing_result(request)
                except DiffusionClientError as error:
                    pause_s = attempts.pause_after(error)
                _pause(attempts, pause_s)

    def cancel(self, request_id: str) -> bool:
        """Cancel a request: True if one of that id was waiting or running, False if there is none (any more).

        The id is what `request_id=` named; a result tells it too. A client cancels its own requests; clients that
        share a `cancel_scope` can cancel each other's. The request that was cancelled raises RequestCancelledError
        where it is waited for, also one that waits to be sent again. Raises as `generate` does.
        """
        request = self._build_cancel_request(request_id)
        if self._stop(request_id):
            return True
        return read_cancelled(self._transport.infer(request), request)

    def families(self, name: str | None = None) -> tuple[Family, ...]:
        """What the served checkpoint takes: its tasks and parameters; with a name, of that family alone.

        Raises as `generate` does.
        """
        request = self._build_families_request(name)
        return read_families(self._infer(request), request)

    def health(self) -> Health:
        """How the stages of the served checkpoint are, asked once: see `is_ready` for a yes or no.

        Raises as `generate` does; ServerUnavailableError where the server cannot be reached.
        """
        request = self._build_health_request()
        return read_health(self._transport.infer(request), request)

    def _infer(self, request: WireRequest) -> Outputs:
        """The answer to a request, which is sent again where that may help."""
        with self._attempts(request, threading.Event()) as attempts:
            while True:
                try:
                    return self._transport.infer(attempts.next_request())
                except DiffusionClientError as error:
                    pause_s = attempts.pause_after(error)
                _pause(attempts, pause_s)

    def is_ready(self) -> bool:
        """Whether the server can be reached and has loaded the model."""
        try:
            return self._ask_ready(READINESS_TIMEOUT_S)
        except NOT_READY_ERRORS:
            return False

    def wait_until_ready(self, timeout_s: float = 600.0) -> None:
        """Return as soon as the server has loaded the model. Raises ServerUnavailableError after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            reason: DiffusionClientError | None = None
            try:
                if self._ask_ready(READINESS_TIMEOUT_S):
                    return
            except NOT_READY_ERRORS as error:
                reason = error
            if time.monotonic() + READINESS_POLL_S > deadline_s:
                raise self._never_ready(timeout_s, reason)
            time.sleep(READINESS_POLL_S)

    def _ask_ready(self, timeout_s: float) -> bool:
        self._require_open()
        return self._note_ready(self._transport.is_ready(self._model, timeout_s))

    def close(self) -> None:
        """End what is under way and close the connection."""
        if not self._closed:
            self._closed = True
            self._stop(None)
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _pause(attempts: Attempts, pause_s: float) -> None:
    stopped = attempts.stopped
    assert isinstance(stopped, threading.Event)
    stopped.wait(pause_s)


def open_transport(connection: Connection) -> GrpcTransport | HttpTransport:
    """What carries the requests of a connection."""
    # Each brings its own libraries: only the one that is used is imported.
    if connection.protocol == "grpc":
        from triton_diffusion_client._grpc import GrpcTransport

        return GrpcTransport(connection)
    from triton_diffusion_client._http import HttpTransport

    return HttpTransport(connection)
