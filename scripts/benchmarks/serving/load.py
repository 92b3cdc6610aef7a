"""The load on one side: requests are sent, answers are looked at only so far as to know a PNG file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from benchmarks.picture import PictureRequest
from benchmarks.serving.schedule import Arrival

Ask = Callable[[PictureRequest], Awaitable[bytes]]
Check = Callable[[bytes], None]
"""Raises for an answer that is none."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A request to send."""

    request: PictureRequest
    cancel_after_s: float | None = None
    """When its caller gives it up, unless it is answered by then; None: never."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A request that has ended. Times are seconds since the epoch, as in the server's log."""

    request: PictureRequest
    sent_s: float
    """With random arrivals the moment when it was due."""
    ended_s: float
    """When the answer was there, or when it was given up."""
    cancelled: bool

    @property
    def latency_s(self) -> float:
        """Seconds until the answer."""
        return self.ended_s - self.sent_s


def counted(plan: Iterator[Planned], title: str, duration_s: float) -> Iterator[Planned]:
    """The plan, with a line on stderr that counts its requests and the time, of so many seconds."""
    return iter(tqdm(plan, desc=f"{title}, {duration_s / 60:g} min", unit="request", mininterval=1.0))


def require_png(answer: bytes) -> None:
    """Raise ValueError for what is no PNG file; the picture in it is not looked at."""
    if not answer.startswith(_PNG_SIGNATURE):
        raise ValueError(f"the answer is no PNG file; it begins with {answer[:40]!r}")


async def closed_loop(
    ask: Ask,
    plan: Iterator[Planned],
    *,
    clients: int,
    num_answers: int | None = None,
    check: Check = require_png,
) -> list[Sent]:
    """Clients that send their next request when the last one has ended.

    Ends when the plan does, or after `num_answers`; what is under way then is waited for.
    """
    sent: list[Sent] = []

    async def run_client() -> None:
        while num_answers is None or sum(not each.cancelled for each in sent) < num_answers:
            planned = next(plan, None)
            if planned is None:
                return
            sent.append(await _send(ask, planned, time.time(), check))

    await asyncio.gather(*(run_client() for _ in range(clients)))
    return sorted(sent, key=lambda each: each.ended_s)


async def open_loop(ask: Ask, arrivals: Sequence[Arrival], requests: Iterable[PictureRequest]) -> list[Sent]:
    """Requests that are sent when they arrive, whatever has become of those before."""
    start_s = time.time()

    async def run_request(arrival: Arrival, request: PictureRequest) -> Sent:
        due_s = start_s + arrival.at_s
        await asyncio.sleep(due_s - time.time())
        return await _send(ask, Planned(request=request), due_s, require_png)

    pairs = zip(arrivals, requests, strict=True)
    return list(await asyncio.gather(*(run_request(arrival, request) for arrival, request in pairs)))


async def _send(ask: Ask, planned: Planned, sent_s: float, check: Check) -> Sent:
    task = asyncio.ensure_future(ask(planned.request))
    await asyncio.wait([task], timeout=planned.cancel_after_s)
    cancelled = not task.done()
    ended_s = time.time()
    if cancelled:
        task.cancel()
        # Whatever comes of it now: nobody waits for it.
        await asyncio.gather(task, return_exceptions=True)
    else:
        check(task.result())
    return Sent(request=planned.request, sent_s=sent_s, ended_s=ended_s, cancelled=cancelled)


def steady_window(sent: Iterable[Sent], *, clients: int, num_pictures: int) -> tuple[float, float]:
    """The times between which `num_pictures` were answered while all clients were at work.

    It begins with the last of the first `clients` answers. Where a side answers batches, these are the end of one, and
    so is the end of the window if `num_pictures` is a multiple of the clients.
    """
    answered_s = sorted(each.ended_s for each in sent if not each.cancelled)
    return answered_s[clients - 1], answered_s[clients + num_pictures - 1]
