"""What the chain model estimates from the requests that it has seen end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from triton_diffusion.request import GenerationRequest

_SMOOTHING = 0.2
_REMEMBERED_ENDS = 64


class DecodingTime:
    """Seconds from latents to the encoded result, in proportion to the pixels; the running mean over all requests."""

    def __init__(self) -> None:
        self._seconds_per_pixel: float | None = None
        self._lock = threading.Lock()

    def observe(self, request: GenerationRequest, seconds: float) -> None:
        """Take in what one request took."""
        observed = seconds / _num_pixels(request)
        with self._lock:
            known = observed if self._seconds_per_pixel is None else self._seconds_per_pixel
            self._seconds_per_pixel = known + _SMOOTHING * (observed - known)

    def estimate_s(self, request: GenerationRequest) -> float:
        """What a request will take; 0 before the first has ended."""
        return (self._seconds_per_pixel or 0.0) * _num_pixels(request)


class EndRate:
    """How often a request ends, from the last ones that did."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_s: deque[float] = deque(maxlen=_REMEMBERED_ENDS)
        self._lock = threading.Lock()

    def note_end(self) -> None:
        """A request has ended now."""
        with self._lock:
            self._ends_s.append(self._clock())

    def expected_s(self, num_requests: int) -> float | None:
        """Seconds until so many requests will have ended at this rate; None while it is not known."""
        with self._lock:
            if len(self._ends_s) < 2:
                return None
            return num_requests * (self._clock() - self._ends_s[0]) / len(self._ends_s)


def _num_pixels(request: GenerationRequest) -> int:
    return request.num_outputs * request.num_frames * request.height * request.width
