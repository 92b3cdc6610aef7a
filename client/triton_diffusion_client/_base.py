"""What DiffusionClient and AsyncDiffusionClient have in common: where to send, and what."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triton_diffusion_client._connection import open_connection
from triton_diffusion_client._model_names import DEFAULT_NAME, helper_name, stream_name
from triton_diffusion_client._protocol import (
    GenerationOptions,
    StreamOptions,
    TransportName,
    WireRequest,
    build_cancel_request,
    build_families_request,
    build_health_request,
    build_request,
    check_text,
    check_timeout,
)
from triton_diffusion_client._retries import DEFAULT_RETRIES, DEFAULT_RETRY_TIMEOUT_S, Attempts, Flag, RetryPolicy
from triton_diffusion_client.errors import (
    DiffusionClientError,
    ModelNotFoundError,
    RequestTimeoutError,
    ServerUnavailableError,
)

READINESS_POLL_S = 0.25
READINESS_TIMEOUT_S = 5.0
# The server waits 5 s for a stage that does not answer, and then says so.
HEALTH_TIMEOUT_S = 15.0

# What a server says, or does not say, before it is ready.
NOT_READY_ERRORS = (ServerUnavailableError, ModelNotFoundError, RequestTimeoutError)


class BaseClient:
    """The arguments of a client (DiffusionClient says what they mean), checked once. Nothing is sent yet."""

    def __init__(
        self,
        url: str | None = None,
        protocol: TransportName = "grpc",
        *,
        model: str = DEFAULT_NAME,
        stream_model: str | None = None,
        cancellation_model: str | None = None,
        cancel_scope: str | None = None,
        timeout_s: float | None = None,
        retries: int = DEFAULT_RETRIES,
        retry_timeout_s: float = DEFAULT_RETRY_TIMEOUT_S,
        connect_timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        ssl: bool = False,
        root_certificates: str | Path | None = None,
        private_key: str | Path | None = None,
        certificate_chain: str | Path | None = None,
    ) -> None:
        self._connection = open_connection(
            url=url,
            protocol=protocol,
            headers=headers,
            ssl=ssl,
            root_certificates=root_certificates,
            private_key=private_key,
            certificate_chain=certificate_chain,
        )
        self._model = model
        self._stream_model = stream_model or stream_name(model)
        self._cancellation_model = cancellation_model or helper_name(model, "cancellation")
        self._families_model = helper_name(model, "families")
        self._health_model = helper_name(model, "health")
        self._cancel_scope = uuid.uuid4().hex if cancel_scope is None else check_text("cancel_scope", cancel_scope)
        self._timeout_s = check_timeout(timeout_s)
        self._retry_policy = RetryPolicy(
            retries=retries, retry_timeout_s=retry_timeout_s, connect_timeout_s=connect_timeout_s
        )
        self._was_connected = threading.Event()
        self._under_way: set[Attempts] = set()
        self._closed = False
        self._prepare_transport()

    def _prepare_transport(self) -> None:
        """For a client that can open its transport before the first request."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.address!r}, {self._connection.protocol!r})"

    def _build_request(self, prompt: str, options: Mapping[str, Any]) -> WireRequest:
        return self._build_chain_request(self._model, prompt, options, GenerationOptions)

    def _build_stream_request(self, prompt: str, options: Mapping[str, Any]) -> WireRequest:
        return self._build_chain_request(self._stream_model, prompt, options, StreamOptions)

    def _build_chain_request(
        self, model: str, prompt: str, options: Mapping[str, Any], allowed: type[GenerationOptions]
    ) -> WireRequest:
        self._require_open()
        return build_request(
            model,
            prompt,
            options,
            allowed=allowed,
            cancel_scope=self._cancel_scope,
            default_timeout_s=self._timeout_s,
        )

    def _build_cancel_request(self, request_id: str) -> WireRequest:
        self._require_open()
        return build_cancel_request(
            self._cancellation_model, request_id, cancel_scope=self._cancel_scope, timeout_s=self._timeout_s
        )

    def _build_families_request(self, name: str | None) -> WireRequest:
        self._require_open()
        return build_families_request(self._families_model, name, timeout_s=self._timeout_s)

    def _build_health_request(self) -> WireRequest:
        self._require_open()
        timeout_s = HEALTH_TIMEOUT_S if self._timeout_s is None else self._timeout_s
        return build_health_request(self._health_model, timeout_s=timeout_s)

    @contextmanager
    def _attempts(self, request: WireRequest, stopped: Flag) -> Iterator[Attempts]:
        """The attempts of a request, which `_stop` finds until the end of the block."""
        attempts = Attempts(request, self._retry_policy, stopped, self._was_connected)
        self._under_way.add(attempts)
        try:
            yield attempts
            self._was_connected.set()
        finally:
            self._under_way.discard(attempts)

    def _stop(self, request_id: str | None) -> bool:
        """No further attempt of the requests of this id (None: of all). Returns whether one was between two of them."""
        found = [each for each in list(self._under_way) if request_id in (None, each.request_id)]
        for attempts in found:
            attempts.stopped.set()
        return any(attempts.is_pausing for attempts in found)

    def _note_ready(self, is_ready: bool) -> bool:
        if is_ready:
            self._was_connected.set()
        return is_ready

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed; make a new one")

    def _never_ready(self, timeout_s: float, reason: DiffusionClientError | None) -> ServerUnavailableError:
        return ServerUnavailableError(
            f"model {self._model!r} at {self._connection.address} was not ready within {timeout_s:g} s"
            + (f": {reason}" if reason else "; the server's log says what it is waiting for")
        )
