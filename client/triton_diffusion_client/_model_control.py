"""Load and unload all models of a name, through Triton's model-control API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from triton_diffusion_client._connection import Connection
from triton_diffusion_client._model_names import chain_names, load_order, stream_name
from triton_diffusion_client._protocol import build_control_request, check_timeout
from triton_diffusion_client.client import open_transport
from triton_diffusion_client.errors import (
    DiffusionClientError,
    ModelNotFoundError,
    RequestTimeoutError,
    ServerError,
)

_UNLOAD_POLL_S = 0.1
# Triton's words, whether it polls its repository or looks at it only once.
_FIXED_MODELS = "explicit model load / unload is not allowed"
_GONE = ("", "UNAVAILABLE")


class ModelControl:
    """The models of a server, which must have been started with --model-control-mode=explicit.

    timeout_s: longest wait for one model; None: as long as it takes.
    """

    def __init__(self, connection: Connection, timeout_s: float | None = None) -> None:
        self._connection = connection
        self._transport = open_transport(connection)
        self._timeout_s = check_timeout(timeout_s)

    def load(self, name: str) -> Iterator[str]:
        """Load the models of a name that the server has; yields each when it is ready.

        The stages load at the same time, the chains behind them, so that no request finds a chain without stages.
        Raises DiffusionClientError; what was loaded before stays loaded.
        """
        loaded: list[str] = []
        models = self._models(name)
        chains = [model for model in models if model in (name, stream_name(name))]
        helpers = [model for model in models if model not in chains]
        with ThreadPoolExecutor(max(1, len(helpers))) as threads:
            under_way = [(model, threads.submit(self._load, model)) for model in helpers]
            for model, done in under_way:
                try:
                    done.result()
                except DiffusionClientError as error:
                    raise self._explain(error, model, "loaded", loaded) from None
                loaded.append(model)
                yield model
        for model in chains:
            try:
                self._load(model)
            except DiffusionClientError as error:
                raise self._explain(error, model, "loaded", loaded) from None
            loaded.append(model)
            yield model

    def _load(self, model: str) -> None:
        # A connection of its own: one of HTTP belongs to the thread that opened it.
        transport = open_transport(self._connection)
        try:
            transport.load_model(build_control_request(model, timeout_s=self._timeout_s))
        finally:
            transport.close()

    def unload(self, name: str) -> Iterator[str]:
        """Unload the models of a name that are loaded, the chain first; yields each when it is gone.

        A chain goes when its requests are done, and needs its stages until then: so one after the other.
        """
        unloaded: list[str] = []
        for model in reversed(self._models(name)):
            if not self._is_loaded(model):
                continue
            try:
                self._transport.unload_model(build_control_request(model, timeout_s=self._timeout_s))
                self._wait_until_gone(model)
            except DiffusionClientError as error:
                raise self._explain(error, model, "unloaded", unloaded) from None
            unloaded.append(model)
            yield model

    def _models(self, name: str) -> list[str]:
        present = self._states()
        chains = chain_names(present)
        if name not in chains:
            raise ModelNotFoundError(
                f"the server's model repository has no models of the name {name!r}; "
                f"names there: {', '.join(chains) or 'none'}"
            )
        return [model for model in load_order(name) if model in present]

    def _states(self) -> dict[str, list[str]]:
        """By model, the state of each version."""
        states: dict[str, list[str]] = {}
        for entry in self._transport.list_models(build_control_request("", timeout_s=self._timeout_s)):
            states.setdefault(entry.name, []).append(entry.state)
        return states

    def _is_loaded(self, model: str) -> bool:
        return any(state not in _GONE for state in self._states().get(model, ()))

    def _wait_until_gone(self, model: str) -> None:
        started_s = time.monotonic()
        while self._is_loaded(model):
            if self._timeout_s is not None and time.monotonic() - started_s > self._timeout_s:
                raise RequestTimeoutError(f"{model} has requests under way")
            time.sleep(_UNLOAD_POLL_S)

    def _explain(
        self, error: DiffusionClientError, model: str, done: str, done_before: list[str]
    ) -> DiffusionClientError:
        if _FIXED_MODELS in error.message:
            return ServerError(
                "the models of this server are fixed at its start; to load and unload them, start it with "
                "--model-control-mode=explicit (and --load-model=* for all models at once)",
                status=error.status,
            )
        before = f"; {done} before it: {', '.join(done_before)}" if done_before else ""
        if isinstance(error, RequestTimeoutError):
            return RequestTimeoutError(
                f"{model} was not {done} within timeout_s={self._timeout_s:g}, and the server goes on with it{before}"
            )
        if error.status in ("INVALID_ARGUMENT", "400"):  # how Triton reports a model that fails
            reason = error.message.strip("; \n")
            return ServerError(f"{model} could not be {done}: {reason}{before}", status=error.status)
        return error

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
