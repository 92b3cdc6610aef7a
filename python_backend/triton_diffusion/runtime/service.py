"""StageService: one stage model as its Triton instance sees it. Requests go in, answers come out of a callback.

One thread owns the scheduler, the worker groups and every request in them; others only put commands in its inbox.
It never waits for anything but its poller, and never imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from triton_diffusion.config import StageConfig
from triton_diffusion.errors import (
    DeadlineExceededError,
    DiffusionError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    ShuttingDownError,
    StageError,
    WorkerGroupError,
    from_wire,
    to_wire,
)
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.observability.metrics import StageMetrics
from triton_diffusion.request import example_request
from triton_diffusion.runtime.messages import (
    AdmitRequest,
    DropRequest,
    GroupFailed,
    GroupReady,
    RunTick,
    TickDone,
)
from triton_diffusion.runtime.work import rows_and_steps, tokens_per_row
from triton_diffusion.runtime.worker_group import WorkerGroup
from triton_diffusion.scheduler import SEND_AHEAD_BELOW_S, Entry, Scheduler, Work
from triton_diffusion.state import (
    CancelOrder,
    Progress,
    ProgressQuery,
    RequestState,
    StageTimings,
    read_stage_input,
    read_state,
    replace_metadata,
    write_num_cancelled,
    write_progress,
)

logger = logging.getLogger(__name__)

Answer = bytes | DiffusionError
OnAnswer = Callable[[Answer], None]

_TICKS_IN_FLIGHT = 2
# How soon a deadline is noticed that cannot be met any more, while no tick comes back.
_DEADLINE_POLL_MS = 100
# A request that was in flight at this many deaths of its group is taken for their cause.
_MAX_ATTEMPTS = 2
_ENDED = Progress(step=0, total=0, elapsed_s=0.0, remaining_s=None, ended=True)


def _guarded(on_answer: OnAnswer) -> OnAnswer:
    """`on_answer`, whose exceptions end in the log: a response sender may raise when its client has gone away."""

    def tell(answer: Answer) -> None:
        try:
            on_answer(answer)
        except Exception:
            logger.exception("an answer could not be delivered")

    return tell


@dataclass
class _Request:
    """A request that this stage owes an answer."""

    blob: bytes
    state: RequestState
    on_answer: OnAnswer
    attempts: int = 0
    preview: bytes | None = None
    preview_step: int = 0
    watchers: list[tuple[ProgressQuery, OnAnswer]] = field(default_factory=list)


@dataclass
class _Replica:
    """A worker group and where it stands in its life; a group that died is replaced after `restart_at_s`."""

    index: int
    group: WorkerGroup | None = None
    ready: bool = False
    start_deadline_s: float = 0.0
    in_flight: int = 0
    failure: str | None = None
    failed_starts: int = 0
    restart_at_s: float = 0.0


class StageService:
    """Scheduler and worker groups of one stage model, behind `submit`."""

    def __init__(self, stage_model: str, config: StageConfig) -> None:
        self._stage_model = stage_model
        self._config = config
        self._checkpoint = open_checkpoint(config.model_path)
        self._family = find_family(self._checkpoint)
        self._family.check_parallel(stage_model, self._checkpoint, config.parallel(stage_model))
        self._scheduler = Scheduler(
            num_replicas=config.num_replicas,
            max_queue_size=config.max_queue_size,
            max_queue_cost=config.max_queue_cost or 4 * config.max_queue_size * self._default_cost(),
            # Until the ranks have told what they measured, nothing runs.
            max_batch_tokens=config.max_batch_tokens or sys.maxsize,
            step_batching=config.denoising_loop == "step_batching",
            policy=config.scheduling_policy,
            slowdown=config.slowdown,
            ageing_s=config.priority_ageing_s,
            clock=time.monotonic,
        )
        self._requests: dict[str, _Request] = {}
        self._by_cancel_key: defaultdict[str, set[str]] = defaultdict(set)
        self._metrics = StageMetrics()
        self._inbox_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._readable: set[zmq.Socket[bytes] | int] = set()
        self._replicas = [_Replica(index) for index in range(config.num_replicas)]
        self._started: queue.SimpleQueue[DiffusionError | None] = queue.SimpleQueue()
        self._has_started = False
        self._stopping = False
        self._closed = False
        self._broken: StageError | None = None
        self._thread = threading.Thread(target=self._run, name=f"{stage_model}-service", daemon=True)

    def start(self) -> None:
        """Start all worker groups and wait until they have loaded.

        Raises:
            DiffusionError: a group could not load, or not in time; nothing is left running.
        """
        self._thread.start()
        error = self._started.get()
        if error is not None:
            self._thread.join()
            raise error

    def submit(self, blob: bytes, on_answer: OnAnswer) -> None:
        """Hand in a state, a progress query or a cancel order; `on_answer` is called exactly once, whatever happens."""
        if not self._call(lambda: self._take(blob, _guarded(on_answer))):
            on_answer(self._shutting_down())

    def metrics(self) -> StageMetrics:
        """The numbers as they stand; from any thread."""
        entries = self._scheduler.entries()
        running = sum(entry.started_s is not None for entry in entries)
        return dataclasses.replace(
            self._metrics,
            queue_depth=len(entries) - running,
            queue_cost=sum(entry.work_left for entry in entries),
            max_batch_tokens=self._scheduler.max_batch_tokens if self._has_started else 0,
            running_requests=running,
            ready_replicas=sum(replica.ready for replica in self._replicas),
        )

    def stop(self) -> None:
        """End the worker groups; requests that are still here fail with ShuttingDownError."""
        self._call(self._begin_stop)
        self._thread.join()

    def _call(self, command: Callable[[], None]) -> bool:
        """Have the service's thread run `command`; False when the service has closed."""
        with self._inbox_lock:
            if self._closed:
                return False
            self._inbox.put(command)
            os.eventfd_write(self._wake_fd, 1)
            return True

    def _shutting_down(self) -> DiffusionError:
        if self._broken is not None:
            return self._broken
        return ShuttingDownError(f"{self._stage_model} is being unloaded; try again")

    def _begin_stop(self) -> None:
        self._stopping = True

    # Everything below runs in the service's own thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            logger.exception("the service of %s broke down", self._stage_model)
            self._broken = StageError(f"the service of {self._stage_model} broke down, reload the model: {error!r}")
            self._started.put(self._broken)
        finally:
            self._close()

    def _close(self) -> None:
        for replica in self._replicas:
            if replica.group is not None:
                try:
                    replica.group.stop(graceful=replica.ready)
                except Exception:
                    logger.exception("%s: replica %d did not stop in order", self._stage_model, replica.index)
        with self._inbox_lock:
            self._closed = True
        self._drain_inbox()
        for request_id in list(self._requests):
            self._end(request_id, self._shutting_down())
        self._context.term()
        os.close(self._wake_fd)

    def _turn(self) -> None:
        """Do what is to be done, and wait until something happens."""
        self._drain_inbox()
        for replica in self._replicas:
            if replica.group is not None:
                self._watch(replica, replica.group)
            if self._stopping:
                return
            if replica.group is None and time.monotonic() >= replica.restart_at_s:
                self._start_group(replica)
            self._drop_late(replica)
            self._send_ticks(replica)
        self._wait()

    def _wait(self) -> None:
        # The times of start and back-off count only while a group is not up.
        timeout_ms = None if all(replica.ready for replica in self._replicas) else 200
        if self._scheduler.num_deadlines:
            timeout_ms = _DEADLINE_POLL_MS
        self._readable = {source for source, _ in self._poller.poll(timeout_ms)}

    def _drain_inbox(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while not self._inbox.empty():
            self._inbox.get()()

    # Worker groups.

    def _start_group(self, replica: _Replica) -> None:
        replica.group = WorkerGroup(
            stage_model=self._stage_model,
            model_path=str(self._checkpoint.path),
            config=self._config,
            replica=replica.index,
            context=self._context,
        )
        for source in replica.group.sources:
            self._poller.register(source, zmq.POLLIN)
        replica.failure = None
        replica.start_deadline_s = time.monotonic() + self._config.startup_timeout_s
        logger.info("%s: starting replica %d, pids %s", self._stage_model, replica.index, replica.group.pids)

    def _watch(self, replica: _Replica, group: WorkerGroup) -> None:
        while (message := group.receive()) is not None:
            match message:
                case GroupReady():
                    self._group_ready(replica, message)
                case GroupFailed():
                    replica.failure = message.message
                case TickDone():
                    replica.in_flight -= 1
                    self._tick_done(group, message)
        if self._readable.intersection(group.pidfds) and (death := group.describe_death()) is not None:
            self._group_died(replica, group, death)
        elif not replica.ready and time.monotonic() > replica.start_deadline_s:
            self._group_died(replica, group, f"did not load within startup_timeout_s={self._config.startup_timeout_s}")

    def _group_ready(self, replica: _Replica, message: GroupReady) -> None:
        replica.ready = True
        replica.failed_starts = 0
        self._scheduler.learn_limits(message.max_batch_tokens, message.measurements)
        self._scheduler.set_available(replica.index, True)
        logger.info(
            "%s: replica %d is ready on %s in %s after %.1f s, max_batch_tokens=%d",
            self._stage_model,
            replica.index,
            message.device,
            message.dtype,
            message.load_s,
            message.max_batch_tokens,
        )
        if all(each.ready for each in self._replicas):
            self._has_started = True
            self._started.put(None)

    def _group_died(self, replica: _Replica, group: WorkerGroup, death: str) -> None:
        """Replace a group that is gone, and run its requests again; before the first start is over, give up."""
        reason = f"replica {replica.index} of {self._stage_model}: {replica.failure or death}"
        logger.error("%s", reason)
        for source in group.sources:
            self._poller.unregister(source)
        group.stop(graceful=False)
        self._metrics.restarts_total += self._has_started
        loaded = replica.ready
        replica.group, replica.ready, replica.in_flight = None, False, 0
        if not self._has_started:
            self._started.put(WorkerGroupError(reason))
            self._stopping = True
            return
        for request_id in self._scheduler.reset_replica(replica.index):
            request = self._requests[request_id]
            request.attempts += 1
            if request.attempts >= _MAX_ATTEMPTS:
                self._end(request_id, WorkerGroupError(f"{reason}; this request was running each time, it is given up"))
            else:
                logger.warning("%s: request %s starts anew", self._stage_model, request_id)
        self._scheduler.set_available(replica.index, False)
        if not loaded:
            replica.failed_starts += 1
            for request_id in self._scheduler.requests_of(replica.index):
                self._end(request_id, WorkerGroupError(f"{reason}; its ranks do not start again; try again later"))
        back_off_s = min(30.0, 2.0**replica.failed_starts) if replica.failed_starts else 0.0
        replica.restart_at_s = time.monotonic() + back_off_s

    def _send_ticks(self, replica: _Replica) -> None:
        while replica.ready and replica.group is not None and self._has_room(replica):
            tick = self._scheduler.next_tick(replica.index)
            if tick is None:
                return
            for request_id in tick.admissions:
                replica.group.send(AdmitRequest(request_id=request_id, state=self._requests[request_id].blob))
            replica.group.send(RunTick(tick_id=tick.tick_id, rows=list(tick.rows), num_steps=tick.num_steps))
            replica.in_flight += 1
            self._metrics.batch_rows_total += len(tick.rows)
            self._metrics.batch_tokens_total += tick.tokens

    def _has_room(self, replica: _Replica) -> bool:
        if replica.in_flight == 0:
            return True
        is_short = self._scheduler.estimate_out_s(replica.index) < SEND_AHEAD_BELOW_S
        return replica.in_flight < _TICKS_IN_FLIGHT and is_short

    def _drop_late(self, replica: _Replica) -> None:
        """End what cannot meet its deadline any more; the ranks drop it before their next step."""
        if not self._scheduler.num_deadlines:
            return
        for request_id in self._scheduler.late_requests(replica.index):
            entry = self._scheduler.entry(request_id)
            self._drop(
                request_id,
                DeadlineExceededError(
                    f"given up in {self._stage_model} after {entry.step} of {entry.work.num_steps} steps, since the "
                    "deadline cannot be met any more; allow more with deadline_s, ask for fewer steps, or send "
                    "deadline_action=continue to have it late"
                ),
            )

    def _tick_done(self, group: WorkerGroup, done: TickDone) -> None:
        self._metrics.ticks_total += 1
        self._metrics.tick_seconds_total += done.duration_s
        for name, count in done.counts.items():
            setattr(self._metrics, name, getattr(self._metrics, name) + count)
        # A request that was cancelled and sent again under its old id has nothing to do with the ticks from before.
        tick = self._scheduler.tick(done.tick_id)
        concerned = {request_id for request_id, _ in tick.rows} if tick else set()
        if tick is not None and not done.failed:
            self._scheduler.observe(tick, done.duration_s)
        for request_id, wire in done.failed.items():
            if request_id in concerned:
                group.send(DropRequest(request_id=request_id))
                self._end(request_id, from_wire(*wire))
        finished = self._scheduler.finish_tick(done.tick_id, done.duration_s)
        for request_id, preview in done.previews.items():
            if request_id in concerned and request_id in self._requests:
                request = self._requests[request_id]
                request.preview, request.preview_step = preview, self._scheduler.entry(request_id).step
        for request_id, request in self._requests.items():
            if request.watchers:
                self._tell_watchers(request_id, request)
        for request_id in finished:
            self._end(request_id, self._with_timings(request_id, done.results[request_id]))

    # Requests.

    def _take(self, blob: bytes, on_answer: OnAnswer) -> None:
        try:
            match read_stage_input(blob):
                case RequestState() as state:
                    self._admit(blob, state, on_answer)
                case ProgressQuery() as query:
                    self._watch_progress(query, on_answer)
                case CancelOrder() as order:
                    self._cancel(order, on_answer)
        except DiffusionError as error:
            on_answer(error)
        except Exception as error:
            # This thread serves every request, so none may end it.
            logger.exception("%s: a request could not be taken", self._stage_model)
            on_answer(from_wire(*to_wire(error)))

    def _admit(self, blob: bytes, state: RequestState, on_answer: OnAnswer) -> None:
        if state.request_id in self._requests:
            raise InvalidRequestError(f"request id {state.request_id!r} is in use by a request that runs")
        try:
            self._scheduler.submit(self._work(state))
        except QueueFullError:
            self._metrics.requests_refused_total += 1
            raise
        except DeadlineExceededError:
            self._metrics.deadlines_exceeded_total += 1
            raise
        self._requests[state.request_id] = _Request(blob, state, on_answer)
        if state.cancel_key:
            self._by_cancel_key[state.cancel_key].add(state.request_id)

    def _work(self, state: RequestState) -> Work:
        request = state.request
        num_rows, num_steps = rows_and_steps(self._stage_model, self._family, self._checkpoint, request)
        return Work(
            request_id=state.request_id,
            batch_key=self._family.batch_key(self._stage_model, request, state.tensor_infos),
            num_rows=num_rows,
            num_steps=num_steps,
            tokens=tokens_per_row(self._stage_model, self._family, self._checkpoint, request),
            priority=request.priority,
            deadline_s=state.deadlines_s.get(self._stage_model),
            deadline_action=request.deadline_action,
        )

    def _default_cost(self) -> int:
        """Tokens x steps of a request that leaves all to the checkpoint."""
        request = example_request(self._family.defaults(self._checkpoint))
        return self._work(RequestState("", request)).cost

    def _cancel(self, order: CancelOrder, on_answer: OnAnswer) -> None:
        named = {*order.request_ids, *self._by_cancel_key.get(order.cancel_key, ())} & self._requests.keys()
        for request_id in named:
            step = self._scheduler.entry(request_id).step
            self._drop(request_id, RequestCancelledError(f"cancelled in {self._stage_model} after {step} steps"))
        on_answer(write_num_cancelled(len(named)))

    def _drop(self, request_id: str, error: DiffusionError) -> None:
        """End a request before it is through; its rows are in no later step."""
        entry = self._scheduler.entry(request_id)
        group = self._replicas[entry.replica].group
        if group is not None and entry.started_s is not None:
            group.send(DropRequest(request_id=request_id))
        self._end(request_id, error)

    def _watch_progress(self, query: ProgressQuery, on_answer: OnAnswer) -> None:
        request = self._requests.get(query.request_id)
        if request is None:
            on_answer(write_progress(_ENDED, None))
            return
        request.watchers.append((query, on_answer))
        self._tell_watchers(query.request_id, request)

    def _tell_watchers(self, request_id: str, request: _Request) -> None:
        progress = self._progress(request_id)
        for query, on_answer in list(request.watchers):
            if progress.step > query.after_step:
                request.watchers.remove((query, on_answer))
                on_answer(
                    write_progress(progress, request.preview if request.preview_step > query.after_step else None)
                )

    def _progress(self, request_id: str) -> Progress:
        entry = self._scheduler.entry(request_id)
        now = time.monotonic()
        elapsed_s = now - (entry.started_s or now)
        total = entry.work.num_steps
        remaining_s = elapsed_s / entry.step * (total - entry.step) if entry.step else None
        return Progress(entry.step, total, elapsed_s, remaining_s)

    def _with_timings(self, request_id: str, blob: bytes) -> bytes:
        """The result of a request, with what this stage measured."""
        entry = self._scheduler.entry(request_id)
        state = read_state(blob)
        started_s = entry.started_s or entry.submitted_s
        timings = StageTimings(queue_s=started_s - entry.submitted_s, run_s=time.monotonic() - started_s)
        if entry.work.num_steps > 1 or self._stage_model == "denoising":
            timings.steps_s = entry.steps_s
        state.timings[self._stage_model] = timings
        return replace_metadata(blob, state.metadata())

    def _end(self, request_id: str, answer: Answer) -> None:
        """The one place where a request leaves: its caller and all who watch it are told."""
        entry = self._scheduler.remove(request_id)
        request = self._requests.pop(request_id)
        if key := request.state.cancel_key:
            self._by_cancel_key[key].discard(request_id)
            if not self._by_cancel_key[key]:
                del self._by_cancel_key[key]
        logger.info(
            "%s: request %s %s after %d of %d steps, %.3f s",
            self._stage_model,
            request_id,
            f"failed: {answer}" if isinstance(answer, DiffusionError) else "done",
            entry.step,
            entry.work.num_steps,
            time.monotonic() - entry.submitted_s,
        )
        self._count_end(entry, answer)
        request.on_answer(answer)
        for _, on_answer in request.watchers:
            on_answer(write_progress(_ENDED, None))

    def _count_end(self, entry: Entry, answer: Answer) -> None:
        now = time.monotonic()
        started_s = entry.started_s or now
        self._metrics.queue_seconds_total += started_s - entry.submitted_s
        self._metrics.stage_seconds_total += now - started_s
        if isinstance(answer, bytes):
            self._metrics.requests_done_total += 1
        elif isinstance(answer, RequestCancelledError):
            self._metrics.requests_cancelled_total += 1
        elif isinstance(answer, DeadlineExceededError):
            self._metrics.deadlines_exceeded_total += 1
        else:
            self._metrics.requests_failed_total += 1
