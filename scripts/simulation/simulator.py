"""The real scheduler under a simulated clock.

Time jumps from event to event: a request arrives, a tick comes back, a caller goes away. At each the scheduler is asked
what the service would ask it, in the same order; only the seconds of a tick are made up.

Simpler than in the service: a tick that was sent runs to its end, whoever goes away meanwhile, and a deadline that
cannot be met any more is noticed when a tick comes back.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simulation.cost_table import CostTable
from simulation.workload import Chunk, Workload, tokens_of
from triton_diffusion.errors import DeadlineExceededError, QueueFullError
from triton_diffusion.scheduler import SEND_AHEAD_BELOW_S, CostModel, Scheduler, Tick, Work

SimulatedPolicy = Literal["fair", "drr", "fifo", "reference"]

_NOISE_CHUNK = 65_536
_PROGRESS_EVERY = 1000


class Ended(IntEnum):
    """How a request ended."""

    NOT = 0
    DONE = 1
    REFUSED = 2
    DROPPED = 3
    """It could not meet its deadline any more."""
    CANCELLED = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The server that is simulated."""

    policy: SimulatedPolicy
    """"reference" is the loop that runs one request at a time through all its steps."""
    num_replicas: int = 1
    max_queue_size: int = 256
    """Requests that may be here at a time, for each replica."""
    ticks_in_flight: int = 1
    """Ticks that a replica may have at a time; a second one is sent ahead only while ticks are short."""
    slowdown: float = 5.0
    ageing_s: float = 30.0
    noise: float = 0.05
    """Standard deviation of the logarithm of a tick's seconds."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of every request, in the order of arrival, and of the replicas."""

    ended: NDArray[np.int8]
    """Values of `Ended`."""
    latency_s: NDArray[np.float64]
    """Until its end, however it ended."""
    kind: NDArray[np.int64]
    priority: NDArray[np.int64]
    lone_s: NDArray[np.float64]
    duration_s: float
    """From the first arrival to the last end."""
    busy_s: float
    """Of all replicas together."""
    num_ticks: int
    batch_rows: int
    """Rows of all ticks together."""
    steps_run: int
    """Of all rows."""
    steps_wasted: int
    """Those of requests that ended otherwise than done."""
    wall_s: float
    """What the simulation itself took."""


MakeScheduler = Callable[[Settings, CostTable, Callable[[], float]], Scheduler]


def simulate(
    workload: Workload,
    table: CostTable,
    settings: Settings,
    *,
    on_progress: Callable[[int], object] | None = None,
    make_scheduler: MakeScheduler | None = None,
) -> Result:
    """Run all requests of a workload to their end.

    `on_progress` is told how many more requests have ended; `make_scheduler` gives another scheduler than that of the
    settings, to try out a policy.

    Raises:
        AssertionError: the scheduler lost a request, ended one twice or ran a step too many or too few.
    """
    simulation = _Simulation(
        workload, table, settings, make_scheduler or _make_scheduler, on_progress or (lambda _: None)
    )
    started = time.perf_counter()
    simulation.run()
    return simulation.result(time.perf_counter() - started)


def _make_scheduler(settings: Settings, table: CostTable, clock: Callable[[], float]) -> Scheduler:
    return Scheduler(
        num_replicas=settings.num_replicas,
        max_queue_size=settings.max_queue_size * settings.num_replicas,
        max_batch_tokens=table.max_batch_tokens,
        clock=clock,
        step_batching=settings.policy != "reference",
        policy="fifo" if settings.policy == "reference" else settings.policy,
        slowdown=settings.slowdown,
        ageing_s=settings.ageing_s,
        cost_model=CostModel(table.curves[table.row_tokens]),
    )


class _Simulation:
    """One run. Requests are known by their number in the order of arrival; as text it is their id."""

    def __init__(
        self,
        workload: Workload,
        table: CostTable,
        settings: Settings,
        make_scheduler: MakeScheduler,
        on_progress: Callable[[int], object],
    ) -> None:
        self._workload = workload
        self._table = table
        self._settings = settings
        self._keys = [str(kind.tokens) for kind in workload.kinds]
        self._now_s = 0.0
        self._scheduler = make_scheduler(settings, table, lambda: self._now_s)
        # (moment, a number that breaks ties, replica of a tick that comes back, the tick), or -1 and a request's id.
        self._events: list[tuple[float, int, int, Tick | str]] = []
        self._num_events = 0
        self._in_flight = [0] * settings.num_replicas
        self._free_at_s = [0.0] * settings.num_replicas
        self._generator = np.random.default_rng(workload.seed + 1)
        self._noise: list[float] = []
        self._seconds: dict[tuple[int, str], float] = {}
        self._ended = array("b", bytes(workload.num_requests))
        self._end_s = array("d", bytes(8 * workload.num_requests))
        self._durations_s: dict[int, float] = {}
        """Of the ticks that are out."""
        self._on_progress = on_progress
        self._num_ended = 0
        self._steps: dict[str, int] = {}
        """Steps that were run of the requests that are here."""
        self._chunks: list[Chunk] = []
        self._busy_s = 0.0
        self._num_ticks = self._batch_rows = self._steps_run = self._steps_wasted = 0

    def run(self) -> None:
        """Until all requests have arrived and ended."""
        number = 0
        for chunk in self._workload.chunks(self._table):
            self._chunks.append(chunk)
            columns = (chunk.at_s, chunk.kind, chunk.steps, chunk.guided, chunk.priority, chunk.lone_s, chunk.cancel_s)
            for at_s, kind, steps, guided, priority, lone_s, cancel_s in zip(
                *(column.tolist() for column in columns), strict=True
            ):
                self._run_until(at_s)
                self._now_s = at_s
                work = self._work(number, kind, steps, guided, priority, lone_s)
                self._arrive(number, work, cancel_s)
                number += 1
        self._run_until(float("inf"))
        self._on_progress(self._num_ended % _PROGRESS_EVERY)

    def _work(self, number: int, kind: int, steps: int, guided: bool, priority: int, lone_s: float) -> Work:
        of_kind = self._workload.kinds[kind]
        factor = self._workload.deadline_factor
        return Work(
            request_id=str(number),
            batch_key=self._keys[kind],
            num_rows=of_kind.num_rows,
            num_steps=steps,
            tokens=tokens_of(of_kind, guided=guided),
            priority=priority,
            deadline_s=None if factor is None else self._now_s + factor * lone_s,
            deadline_action=self._workload.deadline_action,
        )

    def _arrive(self, number: int, work: Work, cancel_s: float) -> None:
        try:
            self._scheduler.submit(work)
        except (QueueFullError, DeadlineExceededError):
            self._end(number, Ended.REFUSED)
            return
        self._steps[work.request_id] = 0
        if cancel_s < float("inf"):
            self._push(cancel_s, -1, work.request_id)
        self._send_ticks(self._scheduler.entry(work.request_id).replica)

    def _run_until(self, at_s: float) -> None:
        """All events up to a moment."""
        events = self._events
        while events and events[0][0] <= at_s:
            self._now_s, _, replica, what = heappop(events)
            if isinstance(what, Tick):
                self._tick_done(replica, what)
            elif what in self._scheduler:
                self._remove(what, Ended.CANCELLED)

    def _push(self, at_s: float, replica: int, what: Tick | str) -> None:
        self._num_events += 1
        heappush(self._events, (at_s, self._num_events, replica, what))

    def _send_ticks(self, replica: int) -> None:
        while self._has_room(replica):
            tick = self._scheduler.next_tick(replica)
            if tick is None:
                return
            seconds = self._tick_s(tick)
            self._in_flight[replica] += 1
            self._free_at_s[replica] = max(self._now_s, self._free_at_s[replica]) + seconds
            self._busy_s += seconds
            self._num_ticks += 1
            self._batch_rows += len(tick.rows)
            self._durations_s[tick.tick_id] = seconds
            self._push(self._free_at_s[replica], replica, tick)

    def _has_room(self, replica: int) -> bool:
        in_flight = self._in_flight[replica]
        if in_flight == 0:
            return True
        if in_flight >= self._settings.ticks_in_flight:
            return False
        return self._scheduler.estimate_out_s(replica) < SEND_AHEAD_BELOW_S

    def _tick_s(self, tick: Tick) -> float:
        seconds = self._seconds.get((tick.tokens, tick.batch_key))
        if seconds is None:
            seconds = self._table.tick_s(tick.tokens, int(tick.batch_key))
            self._seconds[tick.tokens, tick.batch_key] = seconds
        if not self._noise:
            sigma = self._settings.noise
            self._noise = np.exp(self._generator.normal(-(sigma**2) / 2, sigma, _NOISE_CHUNK)).tolist()
        return seconds * tick.num_steps * self._noise.pop()

    def _tick_done(self, replica: int, sent: Tick) -> None:
        self._in_flight[replica] -= 1
        duration_s = self._durations_s.pop(sent.tick_id)
        # Without the rows of requests that have gone meanwhile.
        tick = self._scheduler.tick(sent.tick_id)
        assert tick is not None, f"tick {sent.tick_id} is not known any more"
        self._scheduler.observe(tick, duration_s)
        finished = self._scheduler.finish_tick(tick.tick_id, duration_s)
        self._steps_run += len(sent.rows) * sent.num_steps
        self._steps_wasted += (len(sent.rows) - len(tick.rows)) * sent.num_steps
        for request_id, _ in tick.rows:
            self._steps[request_id] += tick.num_steps
        for request_id in finished:
            self._remove(request_id, Ended.DONE)
        if self._scheduler.num_deadlines:
            for request_id in self._scheduler.late_requests(replica):
                self._remove(request_id, Ended.DROPPED)
        self._send_ticks(replica)

    def _remove(self, request_id: str, how: Ended) -> None:
        work = self._scheduler.remove(request_id).work
        steps = self._steps.pop(request_id)
        if how is not Ended.DONE:
            self._steps_wasted += steps
        elif steps != work.num_rows * work.num_steps:
            raise AssertionError(
                f"request {request_id} ended as done after {steps} steps of its {work.num_rows} rows, but asked for "
                f"{work.num_steps} each"
            )
        self._end(int(request_id), how)

    def _end(self, number: int, how: Ended) -> None:
        if self._ended[number]:
            raise AssertionError(f"request {number} ended twice: {Ended(self._ended[number]).name}, {how.name}")
        self._ended[number] = how
        self._end_s[number] = self._now_s
        self._num_ended += 1
        if self._num_ended % _PROGRESS_EVERY == 0:
            self._on_progress(_PROGRESS_EVERY)

    def result(self, wall_s: float) -> Result:
        """All that was counted; checks that it adds up."""
        ended = np.frombuffer(self._ended, np.int8)
        columns = {
            name: np.concatenate([getattr(chunk, name) for chunk in self._chunks])
            for name in ("at_s", "kind", "steps", "priority", "lone_s")
        }
        rows = np.array([kind.num_rows for kind in self._workload.kinds])
        asked = int((columns["steps"] * rows[columns["kind"]])[ended == Ended.DONE].sum())
        if not ended.all():
            raise AssertionError(
                f"{int((ended == Ended.NOT).sum())} requests never ended, {len(self._scheduler)} are here"
            )
        if self._steps_run != asked + self._steps_wasted:
            raise AssertionError(
                f"{self._steps_run} steps were run, but those that are done asked for {asked}, and "
                f"{self._steps_wasted} were of others"
            )
        end_s = np.frombuffer(self._end_s)
        return Result(
            ended=ended,
            latency_s=end_s - columns["at_s"],
            kind=columns["kind"],
            priority=columns["priority"],
            lone_s=columns["lone_s"],
            duration_s=float(max(end_s.max(), *self._free_at_s) - columns["at_s"][0]),
            busy_s=self._busy_s,
            num_ticks=self._num_ticks,
            batch_rows=self._batch_rows,
            steps_run=self._steps_run,
            steps_wasted=self._steps_wasted,
            wall_s=wall_s,
        )
