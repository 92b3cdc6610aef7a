"""Time in tests: a clock that is moved by hand, and waiting for what happens in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """What the time is."""
        return self.now_s


def wait_until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Return when the condition holds; an AssertionError if it does not by then."""
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, f"not within {timeout_s} s"
        time.sleep(0.02)
