"""Recovery: what becomes of the requests of a worker group that died."""

from __future__ import annotations

from collections.abc import Mapping

from triton_diffusion.errors import ResourceExhaustedError, StageError
from triton_diffusion.observability.metrics import StageMetrics
from triton_diffusion.runtime.held_request import HeldRequest
from triton_diffusion.runtime.last_words import LastWords
from triton_diffusion.runtime.replica import Fault, Replica
from triton_diffusion.runtime.request_book import RequestBook
from triton_diffusion.runtime.suspicion import GIVEN_UP_AFTER
from triton_diffusion.scheduler import Scheduler


class Recovery:
    """Every request goes on from its last checkpoint or from its inputs, at once where another replica is up.

    That is never later than waiting for the group: what has not begun when the group is back returns to it
    (Scheduler.set_available). Only a request that two groups have died of stays with the last one, where it can take no
    other down with it, and moves if that does not come back. Where a rank has said that its memory was too small, none
    is a suspect: batches become smaller, or the request that does not fit ends with ResourceExhaustedError.
    """

    def __init__(self, stage_model: str, scheduler: Scheduler, book: RequestBook, metrics: StageMetrics) -> None:
        self._stage_model = stage_model
        self._scheduler = scheduler
        self._book = book
        self._metrics = metrics

    def recover(self, replica: Replica, fault: Fault) -> list[str]:
        """Take back the requests of a group that is gone; returns what became of which, in words."""
        words = fault.last_words
        too_large = self._end_too_large(words)
        if self._learn_limit(words) or too_large:
            replica.restarts.cause_removed()
        held = {request_id: self._held(request_id) for request_id in self._scheduler.requests_of(replica.index)}
        if words is None or not words.is_of_memory:
            self._accuse(held)
        alone = [request_id for request_id, request in held.items() if request.suspicion.must_be_alone]
        lost = self._scheduler.reset_replica(replica.index, alone=alone)
        given_up = [request_id for request_id in lost if held[request_id].suspicion.is_proven]
        for request_id in given_up:
            self._book.end(request_id, self._killer_error(fault))
            replica.restarts.cause_removed()
        replayed = [request_id for request_id in lost if request_id not in given_up]
        for request_id in replayed:
            held[request_id].restarts += 1
        moved = self.move_waiting(replica)
        self._metrics.replays_total += len(replayed)
        self._metrics.requests_given_up_total += len(given_up)
        self._metrics.moves_total += len(moved)
        outcome = {
            "replayed": [f"{request_id} from step {self._scheduler.entry(request_id).step}" for request_id in replayed],
            "of these alone": [request_id for request_id in alone if request_id in replayed],
            "given up": given_up,
            "too large for the memory": too_large,
            "moved to other replicas": moved,
        }
        return [f"{what}: {', '.join(request_ids)}" for what, request_ids in outcome.items() if request_ids]

    def _end_too_large(self, words: LastWords | None) -> list[str]:
        """End the requests of which a rank has said that not even one row fits in its memory; returns them."""
        if words is None:
            return []
        for request_id in words.too_large.keys() & self._book.requests.keys():
            self._book.end(request_id, ResourceExhaustedError(words.too_large[request_id]))
        return list(words.too_large)

    def _learn_limit(self, words: LastWords | None) -> bool:
        """Make batches smaller if a rank has said that its memory is too small for them; False if they are already."""
        if words is None or not 0 < words.memory_limit < self._scheduler.max_batch_tokens:
            return False
        self._scheduler.learn_limits(words.memory_limit)
        return True

    def _accuse(self, held: Mapping[str, HeldRequest]) -> None:
        """Note that a group died while it had these requests, and nobody knows of what."""
        for request_id, request in held.items():
            entry = self._scheduler.entry(request_id)
            if entry.ticks_out:
                request.suspicion.accuse(entry.planned)

    def move_waiting(self, replica: Replica) -> list[str]:
        """Have the requests of a group that is down run elsewhere, if they may and there is another; returns them."""
        ids = [] if replica.is_overdue else self._scheduler.requests_of(replica.index)
        keep = [request_id for request_id in ids if self._held(request_id).suspicion.must_be_alone]
        return self._scheduler.set_available(replica.index, False, keep=keep)

    def _held(self, request_id: str) -> HeldRequest:
        return self._book.requests[request_id]

    def _killer_error(self, fault: Fault) -> StageError:
        return StageError(
            f"given up: the worker group of {self._stage_model} died {GIVEN_UP_AFTER} times at the same steps of this "
            f"request, at last while it ran alone ({fault.public_cause}); change the request, or ask the operator"
        )
