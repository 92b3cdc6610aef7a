"""Faults that are ordered, to see what becomes of the requests: for tests and for drills, never by default.

Ranks read the environment variable TRITON_DIFFUSION_FAULTS, several parts separated by ";":

    oom_tokens=64       a forward pass of more tokens than 64 runs out of memory
    kill_prompt=TEXT    a rank that runs a request whose prompt contains TEXT ends itself by SIGKILL
    hang_prompt=TEXT    a rank that runs such a request sleeps for ever
    stage=denoising     only in this stage model, not in all
    rank=1              only on this rank of a group, not on all
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from triton_diffusion.errors import ConfigurationError

VARIABLE = "TRITON_DIFFUSION_FAULTS"


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What shall go wrong on this rank; by default nothing."""

    oom_tokens: int | None = None
    kill_prompt: str | None = None
    hang_prompt: str | None = None

    @contextlib.contextmanager
    def during_step(self, prompts: Iterable[str], tokens: int) -> Iterator[None]:
        """Around each forward pass, with the prompts of its requests and the tokens of all its rows.

        Memory runs out in the first module that is called, as it would: what stands before it, and what ranks do
        together to find out that one of them has failed, goes on as always.
        """
        for prompt in prompts:
            if self.kill_prompt is not None and self.kill_prompt in prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.hang_prompt is not None and self.hang_prompt in prompt:
                threading.Event().wait()
        if self.oom_tokens is None or tokens <= self.oom_tokens:
            yield
            return

        def run_out(*_: object) -> None:
            raise torch.OutOfMemoryError(f"{tokens} tokens are more than oom_tokens={self.oom_tokens} of {VARIABLE}")

        hook = register_module_forward_pre_hook(run_out)
        try:
            yield
        finally:
            hook.remove()


NONE = Faults()


def ordered_faults(stage_model: str, rank: int, environment: Mapping[str, str] = os.environ) -> Faults:
    """The faults that the environment orders for a rank of a stage model.

    Raises:
        ConfigurationError: there is a part that means nothing.
    """
    text = environment.get(VARIABLE, "")
    parts = dict(_split(part) for part in text.split(";") if part.strip())
    if parts.pop("stage", stage_model) != stage_model or int(parts.pop("rank", rank)) != rank:
        return NONE
    oom_tokens = parts.pop("oom_tokens", None)
    return Faults(
        oom_tokens=None if oom_tokens is None else int(oom_tokens),
        kill_prompt=parts.pop("kill_prompt", None),
        hang_prompt=parts.pop("hang_prompt", None),
    )


def _split(part: str) -> tuple[str, str]:
    name, _, value = part.strip().partition("=")
    is_number = name in ("oom_tokens", "rank")
    if (
        name not in (*Faults.__dataclass_fields__, "stage", "rank")
        or not value
        or (is_number and not value.isdecimal())
    ):
        raise ConfigurationError(
            f"{VARIABLE}: {part.strip()!r} orders no fault; use oom_tokens=NUMBER, kill_prompt=TEXT, hang_prompt=TEXT, "
            "stage=NAME or rank=NUMBER, separated by ';'"
        )
    return name, value
