"""Replica: one place for a worker group, and the life of the groups that take it one after the other.

A group is started, becomes ready, and runs ticks until it dies or gets stuck. Then it is killed; when all of its ranks
are gone, and with them what they held of their devices, the next one is started, after a pause if it dies every time.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import zmq

from triton_diffusion.config import StageConfig
from triton_diffusion.runtime.gathering import Gathering
from triton_diffusion.runtime.last_words import LastWords
from triton_diffusion.runtime.messages import GroupReady, Message, RunTick, TickDone
from triton_diffusion.runtime.rank_process import group_cores
from triton_diffusion.runtime.restarts import Restarts
from triton_diffusion.runtime.turns import open_turns
from triton_diffusion.runtime.watchdog import Watchdog
from triton_diffusion.runtime.worker_group import WorkerGroup
from triton_diffusion.scheduler import Tick

logger = logging.getLogger(__name__)

# Ranks that were killed are usually gone in milliseconds; a driver may take longer to let them go.
_END_POLL_S = 0.02
_END_TIMEOUT_S = 60.0
# The times of start and back-off are looked at so often.
_DOWN_POLL_S = 0.2
# A start that takes so many times as long as the last one did (and 10 s more) is not to be waited for.
_OVERDUE = 3.0

Source = zmq.Socket[bytes] | int


@dataclass(frozen=True)
class Fault:
    """Why a worker group is of no more use."""

    cause: str
    """Which ranks, and what became of them; for the log."""
    is_hang: bool = False
    public_cause: str = ""
    """What callers are told; by default the same."""
    last_words: LastWords | None = None
    """What the ranks have left to say of it."""

    def __post_init__(self) -> None:
        if not self.public_cause:
            object.__setattr__(self, "public_cause", self.cause)

    @property
    def has_taught(self) -> bool:
        """Whether the ranks have learnt from it to run smaller batches, so that the next start may go better."""
        return self.last_words is not None and self.last_words.memory_limit > 0


class Replica:
    """A worker group, or the time until the next one."""

    def __init__(
        self, index: int, config: StageConfig, launch: Callable[[int], WorkerGroup], poller: zmq.Poller
    ) -> None:
        """Args:
        launch: starts the ranks of the replica of an index.
        poller: gets all sources of the group that is here.
        """
        self.index = index
        self.group: WorkerGroup | None = None
        self.ready = False
        self.restarts = Restarts(config)
        self.gathering = Gathering(open_turns(group_cores(config, index)) if config.take_turns else None)
        self.last_fault: Fault | None = None
        """What the last group ended of; None once a group is up."""
        self.restart_at_s = 0.0
        """When the next group is started; time.monotonic()."""
        self.last_start_s = 0.0
        """Seconds that the last successful start took."""
        self.down_since_s = 0.0
        """When the last group died."""
        self._startup_timeout_s = config.startup_timeout_s
        self._stopped_timeout_s = config.watchdog_floor_s if config.watchdog_ceiling_s else math.inf
        self._launch = launch
        self._poller = poller
        self._watchdog = Watchdog(config)
        self._started_s = 0.0
        self._all_ran_s = 0.0
        """When no rank of a group that starts was last seen stopped."""
        self._ending: WorkerGroup | None = None

    @property
    def num_out(self) -> int:
        """Ticks that have not come back."""
        return len(self._watchdog)

    @property
    def poll_s(self) -> float | None:
        """How soon this replica must be looked at again, though nothing happens."""
        if self._ending is not None:
            return _END_POLL_S
        if not self.ready:
            return _DOWN_POLL_S
        return self.gathering.poll_s or self._watchdog.poll_s

    @property
    def is_overdue(self) -> bool:
        """Whether the next group should be up by now, by the time that the last one took to start."""
        if self.ready or not self.last_start_s:
            return False
        return self.restarts.in_a_row > 1 or time.monotonic() - self.down_since_s > _OVERDUE * self.last_start_s + 10.0

    def start_if_due(self) -> Fault | None:
        """Start the next group, if its time has come and the last one is gone; a fault if that is not possible."""
        self._bury()
        if self.group is not None or self._ending is not None or time.monotonic() < self.restart_at_s:
            return None
        self._started_s = self._all_ran_s = time.monotonic()
        try:
            self.group = self._launch(self.index)
        except OSError as error:
            logger.exception("replica %d: its ranks could not be started", self.index)
            return Fault(f"its ranks could not be started: {error}", public_cause="its ranks could not be started")
        for source in self.group.sources:
            self._poller.register(source, zmq.POLLIN)
        logger.info("replica %d starts, pids %s", self.index, self.group.pids)
        return None

    def receive(self) -> Iterator[GroupReady | TickDone]:
        """What the group has said."""
        while self.group is not None and (message := self.group.receive()) is not None:
            match message:
                case GroupReady():
                    self._become_ready()
                    yield message
                case TickDone():
                    self._watchdog.done(message.tick_id, message.duration_s)
                    self.restarts.progressed()
                    yield message

    def find_fault(self, readable: Collection[Source]) -> Fault | None:
        """What is wrong with the group that is here; `readable` are the poller's sources that have something."""
        if self.group is None:
            return None
        if not set(readable).isdisjoint(self.group.pidfds):
            death = self.group.describe_death()
            if death is not None:
                return self._explain(self.group, Fault(death))
        if not self.ready:
            return self._find_start_fault(self.group)
        stuck = self._watchdog.look(self.group.stopped_ranks)
        return None if stuck is None else self._explain(self.group, Fault(stuck, is_hang=True))

    def _explain(self, group: WorkerGroup, fault: Fault) -> Fault:
        """The fault, with what the ranks have left to say of it."""
        words = group.last_words()
        if words is None:
            return fault
        # They may name files.
        public_cause = fault.public_cause if self.ready else "its ranks could not load"
        return replace(fault, cause=f"{words.message} ({fault.cause})", public_cause=public_cause, last_words=words)

    def _find_start_fault(self, group: WorkerGroup) -> Fault | None:
        now_s = time.monotonic()
        if now_s - self._started_s > self._startup_timeout_s:
            return Fault(f"did not load within startup_timeout_s={self._startup_timeout_s:g}")
        stopped = group.stopped_ranks()
        if not stopped:
            self._all_ran_s = now_s
        # The start has no mean; a rank that a signal has stopped will not load, however long it may take.
        if now_s - self._all_ran_s <= self._stopped_timeout_s:
            return None
        return Fault(f"rank {', '.join(map(str, stopped))} was stopped by a signal while it loaded", is_hang=True)

    def end(self, fault: Fault) -> float:
        """Kill what is left of the group; returns the seconds until the next one is started."""
        if self.group is not None:
            for source in self.group.sources:
                self._poller.unregister(source)
            self.group.kill()
            self._ending = self.group
        self.group, self.ready, self.last_fault = None, False, fault
        self._watchdog.forget()
        back_off_s = self.restarts.died()
        self.down_since_s = time.monotonic()
        self.restart_at_s = self.down_since_s + back_off_s
        self._bury()
        return back_off_s

    def send(self, message: Message) -> None:
        """Tell the group something; without a group, nobody hears it."""
        if self.group is not None:
            self.group.send(message)

    def run(self, tick: Tick, expected_s: float, *, alone: bool) -> None:
        """Send a tick, which takes `expected_s` by the cost model; `alone`: as no other replica has anything to do."""
        self.send(RunTick(tick_id=tick.tick_id, rows=list(tick.rows), num_steps=tick.num_steps, alone=alone))
        self._watchdog.sent(tick, expected_s)

    def stop(self) -> None:
        """End the group for good."""
        for group in (self.group, self._ending):
            if group is not None:
                group.stop(graceful=group is self.group and self.ready)
        self.group, self._ending, self.ready = None, None, False

    def _become_ready(self) -> None:
        self.ready, self.last_fault = True, None
        self.last_start_s = time.monotonic() - self._started_s
        self.restarts.ready()

    def _bury(self) -> None:
        group = self._ending
        if group is None:
            return
        if group.have_ended():
            group.close()
        elif time.monotonic() - self.down_since_s < _END_TIMEOUT_S:
            return
        else:
            logger.error("replica %d: of pids %s some cannot be killed", self.index, group.pids)
        self._ending = None
