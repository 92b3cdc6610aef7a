"""Recovery: what becomes of the requests of a worker group that died."""

from __future__ import annotations

from triton_diffusion.errors import StageError
from triton_diffusion.observability.metrics import StageMetrics
from triton_diffusion.runtime.held_request import HeldRequest
from triton_diffusion.runtime.replica import Fault, Replica
from triton_diffusion.runtime.request_book import RequestBook
from triton_diffusion.runtime.suspicion import GIVEN_UP_AFTER
from triton_diffusion.scheduler import Scheduler


class Recovery:
    """Every request goes on from its last checkpoint or from its inputs, at once where another replica is up.

    That is never later than waiting for the group: what has not begun when the group is back returns to it
    (Scheduler.set_available). Only a request that two groups have died of stays with the last one, where it can take no
    other down with it, and moves if that does not come back.
    """

    def __init__(self, stage_model: str, scheduler: Scheduler, book: RequestBook, metrics: StageMetrics) -> None:
        self._stage_model = stage_model
        self._scheduler = scheduler
        self._book = book
        self._metrics = metrics

    def recover(self, replica: Replica, fault: Fault) -> list[str]:
        """Take back the requests of a group that is gone; returns what became of which, in words."""
        held = {request_id: self._held(request_id) for request_id in self._scheduler.requests_of(replica.index)}
        for request_id, request in held.items():
            entry = self._scheduler.entry(request_id)
            if entry.ticks_out:
                request.suspicion.accuse(entry.planned)
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
            "moved to other replicas": moved,
        }
        return [f"{what}: {', '.join(request_ids)}" for what, request_ids in outcome.items() if request_ids]

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
