"""Threads that nothing waits for: what they call may never return (Triton 24.10: a call to a process that died)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def start_thread(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a thread of its own, which does not keep the process from ending."""
    threading.Thread(target=function, args=arguments, daemon=True).start()


def in_thread(function: Callable[[], _Result]) -> Future[_Result]:
    """The same, for a function that returns something."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    start_thread(run)
    return future
