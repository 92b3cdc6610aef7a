"""When a request is sent again, and what is sent then.

Every request is one that can be sent again: its seed is fixed before it is first sent, so the picture is the same. It
is sent again after a ServerUnavailableError and no other: see `errors` for the answers that are one. These are the
server starting, restarting, draining or full, its process of a model dead, and the connection refused, reset or closed.
A client that has never been connected may be one with a wrong address: `connect_timeout_s` lets it end sooner.

The pauses grow from half a second to ten, or last as long as the server says that it needs, and each is made shorter or
longer by chance, so that many clients that a full server sent away do not come back together.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from triton_diffusion_client._protocol import WireRequest
from triton_diffusion_client.errors import (
    DeadlineExceededError,
    DiffusionClientError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerUnavailableError,
)

logger = logging.getLogger(__name__)

_Error = TypeVar("_Error", bound=DiffusionClientError)

DEFAULT_RETRIES = 20
DEFAULT_RETRY_TIMEOUT_S = 120.0

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0
# A server's word for how long it needs, as in "they need about 3.2 s"; it is not believed beyond this.
_EXPECTED_WAIT = re.compile(r"about (\d{1,9}(?:\.\d{1,9})?) s\b")
_LONGEST_EXPECTED_WAIT_S = 30.0
# A certificate that is not trusted now will not be in a minute.
_HOPELESS = re.compile("certificate.verify.failed", re.IGNORECASE)
# With deadline_action="continue" a request that is late is still wanted.
_SHORTEST_DEADLINE_S = 1e-3


class Flag(Protocol):
    """Both threading.Event and asyncio.Event are this."""

    def set(self) -> None:
        """Raise it; whoever waits for it goes on."""

    def is_set(self) -> bool:
        """Whether it was raised."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often, and for how long in all, a client tries again. Raises ValueError for less than nothing."""

    retries: int = DEFAULT_RETRIES
    """0: the first error is the last."""
    retry_timeout_s: float = DEFAULT_RETRY_TIMEOUT_S
    """Seconds that the pauses between the attempts of one request may last together."""
    connect_timeout_s: float | None = None
    """Seconds since the first attempt after which a client that has never been connected gives up; None: as if it had
    been.
    """

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("retries", "retry_timeout_s", "connect_timeout_s")}
        if not all(limit is None or limit >= 0 for limit in limits.values()):
            given = ", ".join(f"{name}={limit}" for name, limit in limits.items())
            raise ValueError(f"{given}: below 0; give 0 for no second attempt")


class Attempts:
    """One request, over all its attempts.

    stopped: raised by whoever cancels the request or closes the client: there is no further attempt then.
    connected: whether the client has ever been connected to its server; raised here when it was.
    """

    def __init__(
        self,
        request: WireRequest,
        policy: RetryPolicy,
        stopped: Flag,
        connected: Flag,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._request = request
        self._policy = policy
        self._clock, self._draw = clock, draw
        self._connected = connected
        self._started_s: float | None = None
        self._paused_s = 0.0
        self._last_error: ServerUnavailableError | None = None
        self.num_failed = 0
        self.stopped = stopped
        self.is_pausing = False
        """Between two attempts: the server does not know the request then."""

    @property
    def request_id(self) -> str:
        """Of all attempts."""
        return self._request.request_id

    def next_request(self) -> WireRequest:
        """What to send now: of `timeout_s` and `deadline_s` the time that is left since the first attempt.

        Raises RequestCancelledError if the request was stopped, RequestTimeoutError or DeadlineExceededError if no time
        is left.
        """
        self.is_pausing = False
        if self.stopped.is_set():
            raise self._told(RequestCancelledError("cancelled, and not sent again"))
        if self._started_s is None:
            self._started_s = self._clock()
            return self._request
        spent_s = self._spent_s()
        request = self._request
        if request.timeout_s is not None:
            if spent_s >= request.timeout_s:
                raise self._told(RequestTimeoutError(self._no_time("timeout_s", request.timeout_s)))
            request = dataclasses.replace(request, timeout_s=request.timeout_s - spent_s)
        if "deadline_s" in request.values:
            deadline_s = self._deadline_after(spent_s)
            request = dataclasses.replace(request, values={**request.values, "deadline_s": deadline_s})
        return request

    def pause_after(self, error: DiffusionClientError) -> float:
        """Seconds to wait before the next attempt, or raise: `error`, or the reason why there is no next attempt."""
        self.num_failed += 1
        if isinstance(error, RequestTimeoutError) and self._last_error is not None:
            message = self._no_time("timeout_s", self._request.timeout_s)
            raise self._told(RequestTimeoutError(message, status=error.status))
        if not isinstance(error, ServerUnavailableError) or _HOPELESS.search(error.message):
            raise self._told(error)
        self._last_error = error
        if error.was_connected:
            self._connected.set()
        if self.stopped.is_set():
            raise self._told(RequestCancelledError(f"cancelled, and not sent again after: {error}"))
        if self.num_failed > self._policy.retries:
            raise self._told(error)
        left_s = self._policy.retry_timeout_s - self._paused_s
        if (connect_s := self._policy.connect_timeout_s) is not None and not self._connected.is_set():
            if self._spent_s() >= connect_s:
                message = f"{error}; or allow a server that is starting more than connect_timeout_s={connect_s:g}"
                raise self._told(ServerUnavailableError(message, was_connected=False))
            left_s = min(left_s, connect_s - self._spent_s())
        if left_s <= 0:
            raise self._told(error)
        pause_s = min(self._next_pause_s(error), left_s)
        if self._ends_within(pause_s):
            raise self._told(error)
        self._paused_s += pause_s
        self.is_pausing = True
        logger.warning(
            "request %s: %s; attempt %d of at most %d in %.1f s",
            self.request_id,
            " ".join(error.message.split()),
            self.num_failed + 1,
            self._policy.retries + 1,
            pause_s,
        )
        return pause_s

    def _next_pause_s(self, error: ServerUnavailableError) -> float:
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(self.num_failed - 1, 30), _LONGEST_PAUSE_S)
        if (expected := _EXPECTED_WAIT.search(error.message)) is not None:
            pause_s = max(pause_s, min(float(expected[1]), _LONGEST_EXPECTED_WAIT_S))
        return pause_s * (0.5 + self._draw())

    def _ends_within(self, pause_s: float) -> bool:
        """Whether `timeout_s` is over before the next attempt: then it is better to say now what is wrong."""
        return self._request.timeout_s is not None and self._spent_s() + pause_s >= self._request.timeout_s

    def _spent_s(self) -> float:
        """Since the first attempt."""
        return 0.0 if self._started_s is None else self._clock() - self._started_s

    def _deadline_after(self, spent_s: float) -> float:
        given_s = float(self._request.values["deadline_s"])
        left_s = given_s - spent_s
        if left_s > 0:
            return left_s
        if self._request.values.get("deadline_action") == "continue":
            return _SHORTEST_DEADLINE_S
        raise self._told(DeadlineExceededError(f"DEADLINE_EXCEEDED: {self._no_time('deadline_s', given_s)}"))

    def _no_time(self, name: str, given_s: float | None) -> str:
        given = "" if given_s is None else f" within {name}={given_s:g}"
        return f"no result{given} after {self.num_failed} attempts; the last one before it failed: {self._last_error}"

    def _told(self, error: _Error) -> _Error:
        error.request_id = error.request_id or self.request_id
        error.attempts = max(1, self.num_failed)
        return error
