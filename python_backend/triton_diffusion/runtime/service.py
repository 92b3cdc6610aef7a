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
from collections.abc import Callable
from functools import partial

import zmq

from triton_diffusion.config import StageConfig
from triton_diffusion.errors import (
    DiffusionError,
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
from triton_diffusion.runtime.held_request import HeldRequest, OnAnswer, guarded
from triton_diffusion.runtime.messages import AdmitRequest, DropRequest, GroupReady, Message, TickDone
from triton_diffusion.runtime.rank_process import RankProcess
from triton_diffusion.runtime.recovery import Recovery
from triton_diffusion.runtime.replica import Fault, Replica
from triton_diffusion.runtime.request_book import RequestBook
from triton_diffusion.runtime.spares import Spares
from triton_diffusion.runtime.work import rows_and_steps, tokens_per_row
from triton_diffusion.runtime.worker_group import WorkerGroup
from triton_diffusion.scheduler import SEND_AHEAD_BELOW_S, Scheduler, Work
from triton_diffusion.state import (
    CancelOrder,
    HealthQuery,
    ProgressQuery,
    RequestState,
    StageHealth,
    read_stage_input,
    write_health,
)

logger = logging.getLogger(__name__)

_TICKS_IN_FLIGHT = 2
# How soon a deadline is noticed that cannot be met any more, while no tick comes back.
_DEADLINE_POLL_S = 0.1


class StageService:
    """Scheduler and worker groups of one stage model, behind `submit`."""

    def __init__(self, stage_model: str, config: StageConfig) -> None:
        self._stage_model = stage_model
        self._config = config
        self._started_s = time.time()
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
        self._metrics = StageMetrics()
        self._book = RequestBook(stage_model, self._scheduler, self._metrics, self._tell_ranks)
        self._recovery = Recovery(stage_model, self._scheduler, self._book, self._metrics)
        self._inbox_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._readable: set[zmq.Socket[bytes] | int] = set()
        self._spares = Spares(self._start_process, config.ranks_per_replica if config.spare_ranks else 0)
        self._replicas = [Replica(index, config, self._launch, self._poller) for index in range(config.num_replicas)]
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
        """Hand in a state, a query or an order (see state.py); `on_answer` is called exactly once, whatever happens."""
        if not self._call(lambda: self._take(blob, guarded(on_answer))):
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
            checkpoint_bytes=self._book.checkpoint_bytes(),
        )

    def health(self) -> StageHealth:
        """Whether requests are taken, and what is the matter; from any thread."""
        unavailable = self._unavailable()
        down = [
            f"replica {replica.index} starts again: {replica.last_fault.public_cause}"
            for replica in self._replicas
            if replica.last_fault is not None
        ]
        return StageHealth(
            stage=self._stage_model,
            ready=self._has_started and not self._closed and unavailable is None,
            ready_replicas=sum(replica.ready for replica in self._replicas),
            num_replicas=len(self._replicas),
            restarts_total=self._metrics.restarts_total,
            reason=str(self._shutting_down()) if self._closed else str(unavailable or "; ".join(down)),
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
            try:
                replica.stop()
            except Exception:
                logger.exception("%s: replica %d did not stop in order", self._stage_model, replica.index)
        self._spares.close()
        with self._inbox_lock:
            self._closed = True
        self._drain_inbox()
        for request_id in list(self._book.requests):
            self._book.end(request_id, self._shutting_down())
        self._context.term()
        os.close(self._wake_fd)

    def _turn(self) -> None:
        """Do what is to be done, and wait until something happens."""
        self._drain_inbox()
        for replica in self._replicas:
            self._watch(replica)
            if self._stopping:
                return
            self._book.drop_late(replica.index)
            self._send_ticks(replica)
        self._spares.start_if_due()
        self._wait()

    def _wait(self) -> None:
        timeouts_s = [replica.poll_s for replica in self._replicas if replica.poll_s is not None]
        if self._scheduler.num_deadlines:
            timeouts_s.append(_DEADLINE_POLL_S)
        if self._spares.poll_s is not None:
            timeouts_s.append(self._spares.poll_s)
        timeout_ms = round(1000 * min(timeouts_s)) if timeouts_s else None
        self._readable = {source for source, _ in self._poller.poll(timeout_ms)}

    def _drain_inbox(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while not self._inbox.empty():
            self._inbox.get()()

    # Worker groups.

    def _launch(self, replica: int) -> WorkerGroup:
        return WorkerGroup(
            stage_model=self._stage_model,
            model_path=str(self._checkpoint.path),
            config=self._config,
            replica=replica,
            service_started_s=self._started_s,
            context=self._context,
            start=self._spares.take,
        )

    def _start_process(self, replica: int, rank: int) -> RankProcess:
        return RankProcess(self._stage_model, str(self._checkpoint.path), self._config, replica, rank)

    def _watch(self, replica: Replica) -> None:
        for message in replica.receive():
            match message:
                case GroupReady():
                    self._group_ready(replica, message)
                case TickDone():
                    self._tick_done(replica, message)
        fault = replica.find_fault(self._readable) or replica.start_if_due()
        if fault is not None:
            self._group_died(replica, fault)
        elif replica.is_overdue and (moved := self._recovery.move_waiting(replica)):
            # Those that were to run nowhere else have waited long enough.
            self._metrics.moves_total += len(moved)
            logger.warning("%s: replica %d is not back, moved: %s", self._stage_model, replica.index, ", ".join(moved))

    def _group_ready(self, replica: Replica, message: GroupReady) -> None:
        self._scheduler.learn_limits(message.max_batch_tokens, message.measurements)
        moved = self._scheduler.set_available(replica.index, True)
        for other in self._replicas:
            if not other.ready:
                moved += self._recovery.move_waiting(other)
        self._metrics.moves_total += len(moved)
        self._spares.plan(replica.index)
        after = f"{time.monotonic() - replica.down_since_s:.1f} s after its death" if replica.down_since_s else "first"
        logger.info(
            "%s: replica %d is ready (%s) on %s in %s, loaded in %.1f s, max_batch_tokens=%d; moved here: %s",
            self._stage_model,
            replica.index,
            after,
            message.device,
            message.dtype,
            message.load_s,
            message.max_batch_tokens,
            ", ".join(moved) or "none",
        )
        if not self._has_started and all(each.ready for each in self._replicas):
            self._has_started = True
            self._started.put(None)

    def _group_died(self, replica: Replica, fault: Fault) -> None:
        """Replace a group that is gone, and run its requests again; before the first start is over, give up, but where
        the next one will know better.
        """
        back_off_s = replica.end(fault)
        reason = f"replica {replica.index} of {self._stage_model}: {fault.cause}"
        if not self._has_started and (replica.restarts.is_crash_loop or not fault.has_taught):
            logger.error("%s", reason)
            self._started.put(WorkerGroupError(reason))
            self._stopping = True
            return
        self._metrics.restarts_total += 1
        self._metrics.watchdog_kills_total += fault.is_hang
        outcome = self._recovery.recover(replica, fault)
        if (unavailable := self._unavailable()) is not None:
            outcome.append(f"crash loop, answered UNAVAILABLE: {', '.join(self._book.requests) or 'none'}")
            for request_id in list(self._book.requests):
                self._book.end(request_id, unavailable)
        when = f"in {back_off_s:g} s (death {replica.restarts.in_a_row} in a row)" if back_off_s else "at once"
        logger.error("%s; starts again %s; %s", reason, when, "; ".join(outcome) or "no request was there")
        self._book.tell_watchers()

    def _unavailable(self) -> WorkerGroupError | None:
        """What requests are answered while every group is down and dies again and again; None: they are taken."""
        if any(replica.ready or not replica.restarts.is_crash_loop for replica in self._replicas):
            return None
        last = max(self._replicas, key=lambda replica: replica.down_since_s)
        wait_s = max(0.0, min(replica.restart_at_s for replica in self._replicas) - time.monotonic())
        cause = last.last_fault.public_cause if last.last_fault is not None else "unknown"
        return WorkerGroupError(
            f"{self._stage_model} is not ready: its worker groups died {last.restarts.in_a_row} times in a row "
            f"(replica {last.index}: {cause}); they are started again in {wait_s:.0f} s; try again then"
        )

    def _tell_ranks(self, replica: int, message: Message) -> None:
        self._replicas[replica].send(message)

    def _send_ticks(self, replica: Replica) -> None:
        while replica.ready and self._has_room(replica):
            if replica.gathering.shall_wait(partial(self._scheduler.gains_by_waiting, replica.index)):
                return
            tick = self._scheduler.next_tick(replica.index)
            if tick is None:
                return
            for request_id in tick.admissions:
                request = self._book.requests[request_id]
                request.started_s = request.started_s or time.monotonic()
                replica.send(
                    AdmitRequest(request_id=request_id, state=request.blob, checkpoint=request.checkpoint),
                )
            expected_s = self._scheduler.cost_model.tick_s(tick.tokens, tick.batch_key) * tick.num_steps
            replica.run(tick, expected_s, alone=self._scheduler.is_alone(replica.index))

    def _has_room(self, replica: Replica) -> bool:
        if replica.num_out == 0:
            return True
        is_short = self._scheduler.estimate_out_s(replica.index) < SEND_AHEAD_BELOW_S
        return replica.num_out < _TICKS_IN_FLIGHT and is_short

    def _tick_done(self, replica: Replica, done: TickDone) -> None:
        self._metrics.ticks_total += 1
        self._metrics.tick_seconds_total += done.duration_s
        for name, count in done.counts.items():
            setattr(self._metrics, name, getattr(self._metrics, name) + count)
        if done.max_batch_tokens:
            self._scheduler.learn_limits(done.max_batch_tokens)
        # A request that was cancelled and sent again under its old id has nothing to do with the ticks from before.
        tick = self._scheduler.tick(done.tick_id)
        concerned = {request_id for request_id, _ in tick.rows} if tick else set()
        if tick is not None and not done.failed:
            self._scheduler.observe(tick, done.duration_s)
        for request_id, wire in done.failed.items():
            if request_id in concerned:
                replica.send(DropRequest(request_id=request_id))
                self._book.end(request_id, from_wire(*wire))
        for request_id in done.began_anew:
            if request_id in concerned & self._book.requests.keys():
                self._scheduler.lose_checkpoint(request_id)
                self._book.requests[request_id].checkpoint = None
        finished = self._scheduler.finish_tick(done.tick_id, done.duration_s)
        self._keep_checkpoints(done)
        now_s = time.monotonic()
        for request_id in concerned & self._book.requests.keys():
            request, entry = self._book.requests[request_id], self._scheduler.entry(request_id)
            if request.suspicion.weigh(entry.done):
                entry.alone = False
            if request_id in done.previews:
                request.preview, request.preview_step = done.previews[request_id], entry.step
            request.tell_watchers(entry, now_s)
        for request_id in finished:
            self._book.end_with_result(request_id, done.results[request_id])

    def _keep_checkpoints(self, done: TickDone) -> None:
        for request_id, checkpoint in done.checkpoints.items():
            request = self._book.requests.get(request_id)
            if request is not None and self._scheduler.keep(request_id, checkpoint.done):
                request.checkpoint = checkpoint.state

    # Requests.

    def _take(self, blob: bytes, on_answer: OnAnswer) -> None:
        try:
            match read_stage_input(blob):
                case RequestState() as state:
                    self._admit(blob, state, on_answer)
                case ProgressQuery() as query:
                    self._book.watch(query, on_answer)
                case CancelOrder() as order:
                    self._book.cancel(order, on_answer)
                case HealthQuery():
                    on_answer(write_health(self.health()))
        except DiffusionError as error:
            on_answer(error)
        except Exception as error:
            # This thread serves every request, so none may end it.
            logger.exception("%s: a request could not be taken", self._stage_model)
            on_answer(from_wire(*to_wire(error)))

    def _admit(self, blob: bytes, state: RequestState, on_answer: OnAnswer) -> None:
        if (unavailable := self._unavailable()) is not None:
            self._metrics.requests_refused_total += 1
            raise unavailable
        self._book.add(HeldRequest(blob, state, on_answer), self._work(state))

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
