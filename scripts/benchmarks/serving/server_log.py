"""The lines of the server's log that tell how a request left the denoising stage."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

_LINE = re.compile(
    r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*?\bdenoising: request \S+ (.*) after (\d+) of (\d+) steps"
)


@dataclass(frozen=True, kw_only=True)
class EndedRequest:
    """One request that the denoising stage has ended."""

    ended_s: float
    """Seconds since the epoch, to a millisecond."""
    cancelled: bool
    steps_done: int
    num_steps: int


def read_ended_requests(log: str) -> Iterator[EndedRequest]:
    """All of them, in the order of the log."""
    for line in log.splitlines():
        if match := _LINE.search(line):
            time_text, how, steps_done, num_steps = match.groups()
            yield EndedRequest(
                ended_s=datetime.strptime(time_text, "%Y-%m-%d %H:%M:%S,%f").timestamp(),
                cancelled="cancelled" in how,
                steps_done=int(steps_done),
                num_steps=int(num_steps),
            )
