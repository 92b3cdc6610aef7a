"""The client for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
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
    from triton_diffusion_client._grpc import AsyncGrpcTransport
    from triton_diffusion_client._http import AsyncHttpTransport


class AsyncDiffusionClient(BaseClient):
    """DiffusionClient for asyncio: the same arguments, methods and errors, and any number of tasks at the same time.

        async with AsyncDiffusionClient() as client:
            async for event in client.stream("a red circle"):
                print(event)

    Cancelling the task cancels the request on the server. A client belongs to the event loop of its first request.
    """

    _transport: AsyncGrpcTransport | AsyncHttpTransport | None = None

    async def generate(self, prompt: str, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Make pictures or a video of `prompt` and wait for them; see DiffusionClient.generate."""
        request = self._build_request(prompt, options)
        return read_result(await self._infer(request), request)

    def stream(self, prompt: str, **options: Unpack[StreamOptions]) -> AsyncGenerator[Event, None]:
        """As `generate`, but yields Progress and Preview while the server works, and GenerationResult at the end.

        A loop that is left early cancels the request when the generator is collected; `contextlib.aclosing` does it at
        once. See DiffusionClient.stream.
        """
        request = self._build_stream_request(prompt, options)
        self._open_transport().check_stream(request)
        return self._read_stream(request)

    async def _read_stream(self, request: WireRequest) -> AsyncGenerator[Event, None]:
        with self._attempts(request, asyncio.Event()) as attempts:
            while True:
                try:
                    responses = self._open_transport().stream(attempts.next_request())
                    reader = EventReader(request, restarts=attempts.num_failed)
                    async with aclosing(responses):
                        async for outputs in responses:
                            for event in reader.read(outputs):
                                yield event
                                if isinstance(event, GenerationResult):
                                    return
                    raise missing_result(request)
                except DiffusionClientError as error:
                    pause_s = attempts.pause_after(error)
                await _pause(attempts, pause_s)

    async def cancel(self, request_id: str) -> bool:
        """Cancel a request: True if one of that id was waiting or running, False if there is none (any more).

        A client cancels its own requests; clients that share a `cancel_scope` can cancel each other's. The request
        that was cancelled raises RequestCancelledError where it is awaited. See DiffusionClient.cancel.
        """
        request = self._build_cancel_request(request_id)
        if self._stop(request_id):
            return True
        return read_cancelled(await self._open_transport().infer(request), request)

    async def families(self, name: str | None = None) -> tuple[Family, ...]:
        """What the served checkpoint takes; see DiffusionClient.families."""
        request = self._build_families_request(name)
        return read_families(await self._infer(request), request)

    async def health(self) -> Health:
        """How the stages of the served checkpoint are, asked once: see `is_ready` for a yes or no.
        See DiffusionClient.health.
        """
        request = self._build_health_request()
        return read_health(await self._open_transport().infer(request), request)

    async def _infer(self, request: WireRequest) -> Outputs:
        """The answer to a request, which is sent again where that may help."""
        with self._attempts(request, asyncio.Event()) as attempts:
            while True:
                try:
                    return await self._open_transport().infer(attempts.next_request())
                except DiffusionClientError as error:
                    pause_s = attempts.pause_after(error)
                await _pause(attempts, pause_s)

    async def is_ready(self) -> bool:
        """Whether the server can be reached and has loaded the model."""
        try:
            return await self._ask_ready(READINESS_TIMEOUT_S)
        except NOT_READY_ERRORS:
            return False

    async def wait_until_ready(self, timeout_s: float = 600.0) -> None:
        """Return as soon as the server has loaded the model. Raises ServerUnavailableError after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            reason: DiffusionClientError | None = None
            try:
                if await self._ask_ready(READINESS_TIMEOUT_S):
                    return
            except NOT_READY_ERRORS as error:
                reason = error
            if time.monotonic() + READINESS_POLL_S > deadline_s:
                raise self._never_ready(timeout_s, reason)
            await asyncio.sleep(READINESS_POLL_S)

    async def _ask_ready(self, timeout_s: float) -> bool:
        self._require_open()
        return self._note_ready(await self._open_transport().is_ready(self._model, timeout_s))

    def _open_transport(self) -> AsyncGrpcTransport | AsyncHttpTransport:
        """The transport, made at the first use: it belongs to the event loop that runs then."""
        if self._transport is None:
            self._transport = _make_transport(self._connection)
        return self._transport

    async def close(self) -> None:
        """End what is under way and close the connection."""
        self._closed = True
        self._stop(None)
        if self._transport is not None:
            transport, self._transport = self._transport, None
            await transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def _pause(attempts: Attempts, pause_s: float) -> None:
    stopped = attempts.stopped
    assert isinstance(stopped, asyncio.Event)
    with suppress(TimeoutError):
        await asyncio.wait_for(stopped.wait(), pause_s)


def _make_transport(connection: Connection) -> AsyncGrpcTransport | AsyncHttpTransport:
    # Each brings its own libraries: only the one that is used is imported.
    if connection.protocol == "grpc":
        from triton_diffusion_client._grpc import AsyncGrpcTransport

        return AsyncGrpcTransport(connection)
    from triton_diffusion_client._http import AsyncHttpTransport

    return AsyncHttpTransport(connection)
