"""RequestBook: all requests that a stage owes an answer, from their admission to the one place where they end."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable

from triton_diffusion.errors import (
    DeadlineExceededError,
    DiffusionError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
)
from triton_diffusion.observability.metrics import StageMetrics
from triton_diffusion.runtime.held_request import Answer, HeldRequest, OnAnswer, tell_ended
from triton_diffusion.runtime.messages import DropRequest, Message
from triton_diffusion.scheduler import Entry, Scheduler, Work
from triton_diffusion.state import (
    CancelOrder,
    ProgressQuery,
    StageTimings,
    read_state,
    replace_metadata,
    write_num_cancelled,
)

logger = logging.getLogger(__name__)


class RequestBook:
    """The requests beside their entries in the scheduler; belongs to the service's thread."""

    def __init__(
        self,
        stage_model: str,
        scheduler: Scheduler,
        metrics: StageMetrics,
        tell_ranks: Callable[[int, Message], None],
    ) -> None:
        """Args:
        tell_ranks: sends a message to the ranks of a replica, if there are any.
        """
        self.requests: dict[str, HeldRequest] = {}
        self._stage_model = stage_model
        self._scheduler = scheduler
        self._metrics = metrics
        self._tell_ranks = tell_ranks
        self._by_cancel_key: defaultdict[str, set[str]] = defaultdict(set)

    def add(self, request: HeldRequest, work: Work) -> None:
        """Take a request.

        Raises:
            InvalidRequestError: its id is in use.
            QueueFullError, DeadlineExceededError: see Scheduler.submit.
        """
        state = request.state
        if state.request_id in self.requests:
            raise InvalidRequestError(f"request id {state.request_id!r} is in use by a request that runs")
        try:
            self._scheduler.submit(work)
        except QueueFullError:
            self._metrics.requests_refused_total += 1
            raise
        except DeadlineExceededError:
            self._metrics.deadlines_exceeded_total += 1
            raise
        self.requests[state.request_id] = request
        if state.cancel_key:
            self._by_cancel_key[state.cancel_key].add(state.request_id)

    def watch(self, query: ProgressQuery, on_answer: OnAnswer) -> None:
        """Answer a question about progress, at once or when there is some."""
        request = self.requests.get(query.request_id)
        if request is None:
            tell_ended(on_answer)
        else:
            request.watch(query, on_answer, self._scheduler.entry(query.request_id), time.monotonic())

    def tell_watchers(self) -> None:
        """Tell all who watch a request that was started anew."""
        for request_id, request in self.requests.items():
            request.tell_watchers(self._scheduler.entry(request_id), time.monotonic())

    def cancel(self, order: CancelOrder, on_answer: OnAnswer) -> None:
        """End the requests that an order names, and answer how many these were."""
        named = {*order.request_ids, *self._by_cancel_key.get(order.cancel_key, ())} & self.requests.keys()
        for request_id in named:
            step = self._scheduler.entry(request_id).step
            self._drop(request_id, RequestCancelledError(f"cancelled in {self._stage_model} after {step} steps"))
        on_answer(write_num_cancelled(len(named)))

    def drop_late(self, replica: int) -> None:
        """End what cannot meet its deadline any more; the ranks drop it before their next step."""
        if not self._scheduler.num_deadlines:
            return
        for request_id in self._scheduler.late_requests(replica):
            entry = self._scheduler.entry(request_id)
            self._drop(
                request_id,
                DeadlineExceededError(
                    f"given up in {self._stage_model} after {entry.step} of {entry.work.num_steps} steps, since the "
                    "deadline cannot be met any more; allow more with deadline_s, ask for fewer steps, or send "
                    "deadline_action=continue to have it late"
                ),
            )

    def end_with_result(self, request_id: str, blob: bytes) -> None:
        """End a request with its result, to which is added what this stage measured."""
        entry = self._scheduler.entry(request_id)
        state = read_state(blob)
        started_s = entry.started_s or entry.submitted_s
        timings = StageTimings(queue_s=started_s - entry.submitted_s, run_s=time.monotonic() - started_s)
        if entry.work.num_steps > 1 or self._stage_model == "denoising":
            timings.steps_s = entry.steps_s
        state.timings[self._stage_model] = timings
        self.end(request_id, replace_metadata(blob, state.metadata()))

    def end(self, request_id: str, answer: Answer) -> None:
        """The one place where a request leaves: its caller and all who watch it are told."""
        entry = self._scheduler.remove(request_id)
        request = self.requests.pop(request_id)
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
        request.end(answer)

    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoints that are held; from any thread."""
        return sum(len(request.checkpoint or b"") for request in list(self.requests.values()))

    def _drop(self, request_id: str, error: DiffusionError) -> None:
        """End a request before it is through; its rows are in no later step."""
        entry = self._scheduler.entry(request_id)
        if entry.started_s is not None:
            self._tell_ranks(entry.replica, DropRequest(request_id=request_id))
        self.end(request_id, error)

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
