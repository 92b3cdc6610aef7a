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
from triton_diffusion.errors import DiffusionError, ResourceExhaustedError, from_wire, to_wire
from triton_diffusion.request import GenerationRequest
from triton_diffusion.runtime import faults as ordered
from triton_diffusion.runtime.faults import Faults
from triton_diffusion.runtime.last_words import LastWords
from triton_diffusion.runtime.memory import is_out_of_memory, too_large
from triton_diffusion.runtime.messages import AdmitRequest, Checkpoint, RunTick, TickDone
from triton_diffusion.stages.base import StageRequest
from triton_diffusion.stages.executor import run_stage
from triton_diffusion.stages.packing import pack_tensors
from triton_diffusion.stages.plan import StagePlan
from triton_diffusion.state import read_state

logger = logging.getLogger(__name__)

Rows = Sequence[tuple[str, int]]


@dataclass
class _Held:
    """A request on this rank; `work` is made when it is first run."""

    blob: bytes
    checkpoint: bytes | None = None
    work: StageRequest | None = None
    rows_left: dict[int, int] = field(default_factory=dict)
    steps_since_checkpoint: int = 0
    """Of all rows together."""
    tokens_per_row: int = 1


@dataclass(frozen=True)
class _Copied:
    """A checkpoint that is copied and not yet a blob."""

    done: list[int]
    pack: Callable[[], bytes]


class RankExecutor:
    """Runs on every rank, and does the same on every rank.

    After each part that can fail the ranks agree on which requests failed, and of what; those are dropped everywhere,
    and the rest of the batch goes on. A batch that does not fit in memory is run in halves.
    """

    def __init__(
        self,
        plan: StagePlan,
        group: RankGroup,
        *,
        tokens_per_row: Callable[[GenerationRequest], int] = lambda _: 1,
        checkpoint_steps: int = 0,
        faults: Faults = ordered.NONE,
    ) -> None:
        """Args:
        tokens_per_row: what a row of a request adds to a batch.
        checkpoint_steps: steps of a request between two checkpoints; 0: none.
        faults: what shall go wrong.
        """
        self._plan = plan
        self._group = group
        self._tokens_per_row = tokens_per_row
        self._checkpoint_steps = checkpoint_steps
        self._faults = faults
        self._held: dict[str, _Held] = {}
        self._copied: dict[str, _Copied] = {}
        self._threads_by_tokens: Sequence[tuple[int, int]] = ()
        self.num_threads = torch.get_num_threads()
        """Those of this process."""
        self.memory_limit = 0
        """Tokens of a batch that memory was not too small for; 0: it never was."""
        self.on_memory_limit: Callable[[int], None] = lambda _: None
        """Told whenever that changes, before this rank waits for the others, which it may do in vain."""
        self.on_failure: Callable[[LastWords | None], None] = lambda _: None
        """Told what has failed here, also before that; and None, when the others have come."""
        self._began_anew: list[str] = []

    def admit(self, message: AdmitRequest) -> None:
        """Hold a request until a tick names it."""
        self._held[message.request_id] = _Held(message.state, message.checkpoint)

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        self._held.pop(request_id, None)
        self._copied.pop(request_id, None)

    def limit_batch(self, max_batch_tokens: int) -> None:
        """Tell the stage what a forward pass may hold at most."""
        self._plan.on_tick.limit_batch(max_batch_tokens)

    def limit_threads(self, threads_by_tokens: Sequence[tuple[int, int]]) -> None:
        """Run ticks on as many threads as they keep busy: (tokens at most, threads), in rising order; others on all."""
        self._threads_by_tokens = threads_by_tokens

    def limit_memory(self, max_batch_tokens: int) -> None:
        """Never run more than this together: it ran out of memory, now or before this process was started."""
        if 0 < self.memory_limit <= max_batch_tokens:
            return
        self.memory_limit = max_batch_tokens
        self._plan.on_tick.limit_batch(max_batch_tokens)
        self.on_memory_limit(max_batch_tokens)

    def fitting(self, max_batch_tokens: int) -> int:
        """As much of it as fits in memory, as far as is known."""
        return min(max_batch_tokens, self.memory_limit or max_batch_tokens)

    def forget(self) -> None:
        """Drop what the warm-up has left."""
        self._held.clear()
        self._copied.clear()
        self._plan.on_tick.forget()

    @torch.inference_mode()
    def run(self, tick: RunTick, num_threads: int | None = None) -> TickDone:
        """Run a tick; every rank must call this with equal ticks. The answer counts on rank 0 alone.

        num_threads: use no more than these; None: all that there are.
        """
        started = time.perf_counter()
        known_limit = self.memory_limit
        self._began_anew = []
        failed = self._prepare(tick.rows)
        rows = [row for row in tick.rows if row[0] in self._held]
        tokens = self._tokens(rows)
        self._use_threads(tokens, num_threads or self.num_threads)
        counts = {"batch_rows_total": len(rows), "batch_tokens_total": tokens}
        for _ in range(tick.num_steps):
            if rows:
                failed |= self._step(rows)
                rows = [row for row in rows if row[0] in self._held]
        # While the device is at work: it has copied them before.
        checkpoints = self._take_checkpoints()
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)
        results, previews = self._collect(rows, failed) if self._group.is_main else ({}, {})
        self._forget_finished(rows)
        self._copy_checkpoints(rows)
        return TickDone(
            tick_id=tick.tick_id,
            duration_s=time.perf_counter() - started,
            failed={request_id: to_wire(error) for request_id, error in failed.items()},
            results=results,
            previews=previews,
            counts=counts | self._plan.on_tick.take_counts(),
            checkpoints=checkpoints,
            max_batch_tokens=self.memory_limit if self.memory_limit != known_limit else 0,
            began_anew=self._began_anew,
        )

    def _use_threads(self, tokens: int, allowed: int) -> None:
        limits = self._threads_by_tokens
        threads = min(allowed, next((threads for most, threads in limits if tokens <= most), self.num_threads))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _prepare(self, rows: Rows) -> dict[str, DiffusionError]:
        """Run the admission stages of requests that are new; returns those that failed."""
        failed: dict[str, DiffusionError] = {}
        for request_id in _request_ids(rows):
            if request_id in self._held and self._held[request_id].work is None:
                failed |= self._begin(request_id)
        failed = {request_id: self._with_size(request_id, error) for request_id, error in failed.items()}
        self._drop(failed)
        return failed

    def _begin(self, request_id: str) -> dict[str, DiffusionError]:
        """Bring a request to its first step, or where it was at its checkpoint."""
        held = self._held[request_id]
        failed = self._attempt([request_id], partial(self._open, request_id))
        for stage in self._plan.on_admission:
            failed = failed or self._attempt([request_id], partial(run_stage, stage, [held.work], self._group))
        failed = failed or self._attempt([request_id], partial(self._count_steps, held))
        if failed or held.checkpoint is None:
            return failed
        if not (unusable := self._attempt([request_id], partial(self._resume, held))):
            return {}
        # Its rows may be half of the checkpoint's: they are made anew.
        logger.warning("request %s begins anew, not at its checkpoint: %s", request_id, unusable[request_id])
        self._began_anew.append(request_id)
        held.checkpoint = None
        return self._begin(request_id)

    def _open(self, request_id: str) -> None:
        held = self._held[request_id]
        state = read_state(held.blob)
        held.work = StageRequest(request_id, state.request, load(held.blob))
        held.tokens_per_row = self._tokens_per_row(state.request)

    def _count_steps(self, held: _Held) -> None:
        """Count the steps that a request has left."""
        assert held.work is not None
        stage = self._plan.on_tick
        steps = zip(stage.num_steps(held.work), stage.steps_done(held.work), strict=False)
        held.rows_left = {index: total - done for index, (total, done) in enumerate(steps)}

    def _resume(self, held: _Held) -> None:
        """Put a request that has been prepared where it was at its checkpoint."""
        assert held.work is not None
        assert held.checkpoint is not None
        self._plan.on_tick.resume(held.work, held.checkpoint)
        self._count_steps(held)
        held.checkpoint = None

    def _step(self, rows: Rows) -> dict[str, DiffusionError]:
        """One step of all rows, together as far as memory allows."""
        failed: dict[str, DiffusionError] = {}
        for part in self._parts(rows):
            failed |= self._run(part)
        self._drop(failed)
        alive = [row for row in rows if row[0] in self._held]
        self._plan.on_tick.commit(self._items(alive))
        for request_id, index in alive:
            self._held[request_id].rows_left[index] -= 1
            self._held[request_id].steps_since_checkpoint += 1
        return failed

    def _parts(self, rows: Rows) -> list[Rows]:
        """The rows in batches that memory is known to be large enough for."""
        if not self.memory_limit or self._tokens(rows) <= self.memory_limit:
            return [rows]
        parts: list[list[tuple[str, int]]] = [[]]
        for row in rows:
            if parts[-1] and self._tokens([*parts[-1], row]) > self.memory_limit:
                parts.append([])
            parts[-1].append(row)
        return list(parts)

    def _run(self, rows: Rows) -> dict[str, DiffusionError]:
        """A forward pass of these rows; if it fails, of fewer. Returns the requests that failed alone."""
        requests = _request_ids(rows)
        failed = self._attempt(requests, partial(self._forward, rows), rows)
        if not failed:
            return {}
        if self._group.device.type == "cuda":
            torch.cuda.empty_cache()
        if any(isinstance(error, ResourceExhaustedError) for error in failed.values()):
            return self._run_smaller(rows, failed)
        if len(requests) == 1:
            return failed
        # One of them is at fault: the others shall not suffer.
        failed = {}
        for request_id in requests:
            failed |= self._run([row for row in rows if row[0] == request_id])
        return failed

    def _run_smaller(self, rows: Rows, failed: dict[str, DiffusionError]) -> dict[str, DiffusionError]:
        """Rows that did not fit in memory together, in halves; a single one as its stage knows to save memory."""
        if len(rows) > 1:
            first, second = _halves(rows)
            self.limit_memory(self._tokens(second))
            failed = self._run(first)
            rest = [row for row in second if row[0] not in failed]
            return failed | (self._run(rest) if rest else {})
        if self._plan.on_tick.need_less_memory(self._items(rows)[0]):
            return self._run(rows)
        return {request_id: self._with_size(request_id, error) for request_id, error in failed.items()}

    def _forward(self, rows: Rows) -> None:
        prompts = (work.request.prompt for id_ in _request_ids(rows) if (work := self._held[id_].work) is not None)
        with self._faults.during_step(prompts, self._tokens(rows)):
            run_stage(self._plan.on_tick, self._items(rows), self._group)

    def _attempt(
        self, request_ids: Sequence[str], run: Callable[[], None], rows: Rows = ()
    ) -> dict[str, DiffusionError]:
        """Call `run`; an exception on any rank is the failure of `request_ids` on all.

        rows: those of a forward pass. If this rank alone fails in it and the others wait there, it has no other chance
        to say so, and to learn that its memory is too small.
        """
        failures: dict[str, DiffusionError] = {}
        try:
            run()
        except Exception as error:
            # Not the exception itself: its traceback would keep the tensors of the failed pass while it is tried again.
            failures = dict.fromkeys(request_ids, _as_failure(error))
            if is_out_of_memory(error):
                names = ", ".join(request_ids)
                logger.warning("%s ran out of memory with requests %s: %s", self._plan.on_tick.name, names, str(error))
            else:
                logger.exception("%s failed", self._plan.on_tick.name)
        if not failures:
            return self._group.agree({})
        self.on_failure(self._learn(request_ids, failures[request_ids[0]], rows))
        agreed = self._group.agree(failures)
        self.on_failure(None)
        return agreed

    def _learn(self, request_ids: Sequence[str], failure: DiffusionError, rows: Rows) -> LastWords:
        """Take note of memory that is too small; returns what there is to say of the failure, should it be the last."""
        message = f"{self._plan.on_tick.name} failed with requests {', '.join(request_ids)}: {failure}"
        if not rows or not isinstance(failure, ResourceExhaustedError):
            return LastWords(message=message)
        if len(rows) > 1:
            half = self._tokens(_halves(rows)[1])
            self.limit_memory(half)
            return LastWords(message=message, memory_limit=half)
        return LastWords(message=message, too_large={request_ids[0]: str(self._with_size(request_ids[0], failure))})

    def _tokens(self, rows: Rows) -> int:
        return sum(self._held[request_id].tokens_per_row for request_id, _ in rows)

    def _with_size(self, request_id: str, error: DiffusionError) -> DiffusionError:
        """Out of memory, in the words that a caller needs; any other error as it is."""
        held = self._held[request_id]
        if not isinstance(error, ResourceExhaustedError) or held.work is None:
            return error
        return too_large(self._plan.on_tick.name, held.work.request, held.tokens_per_row, self._group.device)

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

    def _copy_checkpoints(self, rows: Rows) -> None:
        """Begin to copy the requests that have run far enough since the last time."""
        if not self._checkpoint_steps or not self._group.is_main:
            return
        for request_id in _request_ids(rows):
            held = self._held.get(request_id)
            if held is None or held.steps_since_checkpoint < self._checkpoint_steps * len(held.rows_left):
                continue
            assert held.work is not None
            held.steps_since_checkpoint = 0
            pack = self._plan.on_tick.checkpoint(held.work)
            if pack is not None:
                self._copied[request_id] = _Copied(self._plan.on_tick.steps_done(held.work), pack)

    def _take_checkpoints(self) -> dict[str, Checkpoint]:
        """Those that were copied behind the last tick."""
        copied, self._copied = self._copied, {}
        return {
            request_id: Checkpoint(done=each.done, state=each.pack())
            for request_id, each in copied.items()
            if request_id in self._held
        }

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
                failed[request_id] = self._with_size(request_id, _as_failure(error))
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


def _as_failure(error: Exception) -> DiffusionError:
    """The error without its traceback, and without what only the operator shall see."""
    return ResourceExhaustedError("out of memory") if is_out_of_memory(error) else from_wire(*to_wire(error))


def _halves(rows: Rows) -> tuple[Rows, Rows]:
    """The second one is the larger."""
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def _request_ids(rows: Rows) -> list[str]:
    return list(dict.fromkeys(request_id for request_id, _ in rows))
