"""How soon a group was ready again, by the server's own account."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.faults.ranks import Fault

_READY = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*?\b(\w+): replica (\d+) is ready\b")
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class GroupReady:
    """A group that has become ready."""

    at_s: float
    """Seconds since the epoch, to a millisecond."""
    stage: str
    replica: int


def read_ready_groups(log: str) -> Iterator[GroupReady]:
    """All of them, in the order of the log."""
    for time_text, stage, replica in _READY.findall(log):
        at_s = datetime.strptime(time_text, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        yield GroupReady(at_s=at_s, stage=stage, replica=int(replica))


def recovery_times(faults: Iterable[Fault], ready: Sequence[GroupReady]) -> list[float | None]:
    """Seconds from each fault until its group was ready again; None: it was not."""

    def recovery_s(fault: Fault) -> float | None:
        place = fault.rank.stage, fault.rank.replica
        times_s = [each.at_s for each in ready if (each.stage, each.replica) == place and each.at_s > fault.at_s]
        return min(times_s) - fault.at_s if times_s else None

    return [recovery_s(fault) for fault in faults]


class ServerLog:
    """What a server has written since now."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin = path.stat().st_size

    def recovery_times(self, faults: Sequence[Fault]) -> list[float | None]:
        """As the function, from the log as it is."""
        with self._path.open("rb") as log:
            log.seek(self._begin)
            return recovery_times(faults, list(read_ready_groups(log.read().decode(errors="replace"))))

    async def wait_until_recovered(self, faults: Sequence[Fault], timeout_s: float) -> None:
        """Return as soon as all groups are back, or after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while None in self.recovery_times(faults) and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S)
