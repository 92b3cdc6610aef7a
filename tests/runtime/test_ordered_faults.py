"""The faults that an environment variable orders."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.runtime.faults import VARIABLE, Faults, ordered_faults


def order(text: str, stage_model: str = "denoising", rank: int = 0) -> Faults:
    return ordered_faults(stage_model, rank, {VARIABLE: text})


def test_by_default_nothing_goes_wrong() -> None:
    assert ordered_faults("denoising", 0, {}) == Faults() == order("") == order(" ; ")


def test_several_faults_are_separated_by_semicolons() -> None:
    expected = Faults(oom_tokens=64, kill_prompt="a = b, c", hang_prompt="x")
    assert order("oom_tokens=64; kill_prompt=a = b, c;hang_prompt=x;") == expected


def test_stage_and_rank_say_where() -> None:
    text = "oom_tokens=64;stage=denoising;rank=1"
    assert order(text, rank=1) == Faults(oom_tokens=64)
    assert order(text, rank=0) == order(text, "decoding", rank=1) == Faults()


@pytest.mark.parametrize(
    "text", ["oom_tokens", "oom_tokens=x", "oom_tokens=-1", "rank=one", "kill=x", "kill_prompt=", "x"]
)
def test_what_orders_no_fault_is_an_error(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"orders no fault; use oom_tokens=NUMBER"):
        order(text)


def test_memory_runs_out_in_a_module_and_only_in_a_step_that_is_too_large() -> None:
    module, inputs = torch.nn.Linear(2, 2), torch.zeros(1, 2)
    some = Faults(oom_tokens=3)
    with some.during_step([], 3):
        module(inputs)
    with pytest.raises(torch.OutOfMemoryError, match="4 tokens are more than oom_tokens=3"), some.during_step([], 4):
        module(inputs)
    module(inputs)


def test_a_prompt_kills_and_another_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(threading.Event, "wait", lambda self: seen.append("hangs"))
    some = Faults(kill_prompt="hemlock", hang_prompt="dormouse")
    for prompts in (["a cup"], ["x", "a cup of hemlock"], ["a dormouse"]):
        with some.during_step(prompts, 1):
            seen.append("runs")
    assert seen == ["runs", (os.getpid(), signal.SIGKILL), "runs", "hangs", "runs"]
