"""What a rank does with ticks: keep the requests it was given, run the stages on their rows, make the results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from safetensors.torch import load

from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.errors import DiffusionError, from_wire, to_wire
from triton_diffusion.runtime.messages import AdmitRequest, RunTick, TickDone
from triton_diffusion.stages.base import StageRequest
from triton_diffusion.stages.executor import pack_tensors, run_stage
from triton_diffusion.stages.plan import StagePlan
from triton_diffusion.state import read_state

logger = logging.getLogger(__name__)

Rows = Sequence[tuple[str, int]]


@dataclass
class _Held:
    """A request on this rank; `work` is made when it is first run."""

    blob: bytes
    work: StageRequest | None = None
    rows_left: dict[int, int] = field(default_factory=dict)


class RankExecutor:
    """Runs on every rank, and does the same on every rank.

    After each part that can fail the ranks agree on which requests failed; those are dropped everywhere, and the rest
    of the batch goes on.
    """

    def __init__(self, plan: StagePlan, group: RankGroup) -> None:
        self._plan = plan
        self._group = group
        self._held: dict[str, _Held] = {}

    def admit(self, message: AdmitRequest) -> None:
        """Hold a request until a tick names it."""
        self._held[message.request_id] = _Held(message.state)

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        self._held.pop(request_id, None)

    def limit_batch(self, max_batch_tokens: int) -> None:
        """Tell the stage what a forward pass may hold at most."""
        self._plan.on_tick.limit_batch(max_batch_tokens)

    def forget(self) -> None:
        """Drop what the warm-up has left."""
        self._held.clear()
        self._plan.on_tick.forget()

    @torch.inference_mode()
    def run(self, tick: RunTick) -> TickDone:
        """Run a tick; every rank must call this with equal ticks. The answer counts on rank 0 alone."""
        started = time.perf_counter()
        failed = self._prepare(tick.rows)
        rows = [row for row in tick.rows if row[0] in self._held]
        for _ in range(tick.num_steps):
            if rows:
                failed |= self._step(rows)
                rows = [row for row in rows if row[0] in self._held]
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)
        results, previews = self._collect(rows, failed) if self._group.is_main else ({}, {})
        self._forget_finished(rows)
        return TickDone(
            tick_id=tick.tick_id,
            duration_s=time.perf_counter() - started,
            failed={request_id: to_wire(error) for request_id, error in failed.items()},
            results=results,
            previews=previews,
            counts=self._plan.on_tick.take_counts(),
        )

    def _prepare(self, rows: Rows) -> dict[str, DiffusionError]:
        """Run the admission stages of requests that are new; returns those that failed."""
        failed: dict[str, DiffusionError] = {}
        for request_id in _request_ids(rows):
            if request_id in self._held and self._held[request_id].work is None:
                failed |= self._attempt([request_id], partial(self._open, request_id))
                for stage in self._plan.on_admission:
                    if request_id not in failed:
                        work = self._held[request_id].work
                        failed |= self._attempt([request_id], partial(run_stage, stage, [work], self._group))
                if request_id not in failed:
                    self._count_steps(self._held[request_id])
        self._drop(failed)
        return failed

    def _open(self, request_id: str) -> None:
        held = self._held[request_id]
        state = read_state(held.blob)
        held.work = StageRequest(request_id, state.request, load(held.blob))

    def _count_steps(self, held: _Held) -> None:
        assert held.work is not None
        held.rows_left = dict(enumerate(self._plan.on_tick.num_steps(held.work)))

    def _step(self, rows: Rows) -> dict[str, DiffusionError]:
        """One step of all rows together; if that fails, of each request alone, to find the one at fault."""
        requests = _request_ids(rows)
        failed = self._attempt(requests, lambda: run_stage(self._plan.on_tick, self._items(rows), self._group))
        if failed and len(requests) > 1:
            failed = {}
            if self._group.device.type == "cuda":
                torch.cuda.empty_cache()
            for request_id in requests:
                own = self._items([row for row in rows if row[0] == request_id])
                failed |= self._attempt([request_id], partial(run_stage, self._plan.on_tick, own, self._group))
        self._drop(failed)
        alive = [row for row in rows if row[0] in self._held]
        self._plan.on_tick.commit(self._items(alive))
        for request_id, index in alive:
            self._held[request_id].rows_left[index] -= 1
        return failed

    def _attempt(self, request_ids: Sequence[str], run: Callable[[], None]) -> dict[str, DiffusionError]:
        """Call `run`; an exception on any rank is the failure of `request_ids` on all."""
        failures: dict[str, BaseException] = {}
        try:
            run()
        except Exception as error:
            logger.exception("%s failed", self._plan.on_tick.name)
            # Not the exception itself: its traceback would keep the tensors of the failed pass while it is tried again.
            failures = dict.fromkeys(request_ids, from_wire(*to_wire(error)))
        return self._group.agree(failures)

    def _drop(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.drop(request_id)

    def _items(self, rows: Rows) -> list[Any]:
        items = []
        for request_id, index in rows:
            work = self._held[request_id].work
            assert work is not None
            items.append(self._plan.on_tick.items(work, index))
        return items

    def _collect(self, rows: Rows, failed: dict[str, DiffusionError]) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Results of the requests that have ended and previews of others; an error here is that request's own."""
        results: dict[str, bytes] = {}
        previews: dict[str, bytes] = {}
        for request_id in _request_ids(rows):
            held = self._held[request_id]
            assert held.work is not None
            try:
                if not any(held.rows_left.values()):
                    self._plan.on_tick.collect(held.work)
                    results[request_id] = self._pack(held, held.work.outputs)
                elif (preview := self._plan.on_tick.preview(held.work)) is not None:
                    previews[request_id] = self._pack(held, preview)
            except Exception as error:
                failed[request_id] = from_wire(*to_wire(error))
        return results, previews

    def _pack(self, held: _Held, tensors: dict[str, torch.Tensor]) -> bytes:
        assert held.work is not None
        state = read_state(held.blob)
        state.warnings += held.work.warnings
        return pack_tensors(tensors, state.metadata())

    def _forget_finished(self, rows: Rows) -> None:
        for request_id in _request_ids(rows):
            if not any(self._held[request_id].rows_left.values()):
                self.drop(request_id)


def _request_ids(rows: Rows) -> list[str]:
    return list(dict.fromkeys(request_id for request_id, _ in rows))
