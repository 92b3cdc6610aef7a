"""HeldRequest: a request that a stage owes an answer, and who else wants to know of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from triton_diffusion.errors import DiffusionError
from triton_diffusion.runtime.suspicion import Suspicion
from triton_diffusion.scheduler import Entry
from triton_diffusion.state import Progress, ProgressQuery, RequestState, write_progress

logger = logging.getLogger(__name__)

Answer = bytes | DiffusionError
OnAnswer = Callable[[Answer], None]

_ENDED = Progress(step=0, total=0, elapsed_s=0.0, remaining_s=None, ended=True)


def guarded(on_answer: OnAnswer) -> OnAnswer:
    """`on_answer`, whose exceptions end in the log: a response sender may raise when its client has gone away."""

    def tell(answer: Answer) -> None:
        try:
            on_answer(answer)
        except Exception:
            logger.exception("an answer could not be delivered")

    return tell


def tell_ended(on_answer: OnAnswer) -> None:
    """Tell one who watches a request that it is not here (any more)."""
    on_answer(write_progress(_ENDED, None))


@dataclass
class HeldRequest:
    """A request that this stage owes an answer."""

    blob: bytes
    state: RequestState
    on_answer: OnAnswer
    checkpoint: bytes | None = None
    """What its ranks need to go on from the last checkpoint."""
    restarts: int = 0
    """Worker groups that died while they had it."""
    suspicion: Suspicion = field(default_factory=Suspicion)
    preview: bytes | None = None
    preview_step: int = 0
    started_s: float | None = None
    """When it was first started."""
    _watchers: list[tuple[ProgressQuery, OnAnswer]] = field(default_factory=list)

    def watch(self, query: ProgressQuery, on_answer: OnAnswer, entry: Entry, now_s: float) -> None:
        """Have `on_answer` called as soon as there is what `query` asks for."""
        self._watchers.append((query, on_answer))
        self.tell_watchers(entry, now_s)

    def tell_watchers(self, entry: Entry, now_s: float) -> None:
        """Answer those whose question has an answer now."""
        if not self._watchers:
            return
        progress = self._progress(entry, now_s)
        for query, on_answer in list(self._watchers):
            if progress.step > query.after_step or self.restarts > query.after_restarts:
                self._watchers.remove((query, on_answer))
                on_answer(write_progress(progress, self.preview if self.preview_step > query.after_step else None))

    def end(self, answer: Answer) -> None:
        """Tell the caller, and all who watch."""
        self.on_answer(answer)
        for _, on_answer in self._watchers:
            tell_ended(on_answer)

    def _progress(self, entry: Entry, now_s: float) -> Progress:
        elapsed_s = 0.0 if self.started_s is None else now_s - self.started_s
        left = entry.work.num_steps - entry.step
        # Since its last start: a restart from a checkpoint has not done the steps before.
        done = entry.step - sum(entry.kept) // entry.work.num_rows if self.restarts else entry.step
        running_s = now_s - entry.started_s if entry.started_s is not None else 0.0
        remaining_s = running_s / done * left if done > 0 and running_s else None
        return Progress(entry.step, entry.work.num_steps, elapsed_s, remaining_s, restarts=self.restarts)
