"""A rank that fails alone while the others wait for it: what it leaves to say ends the group, or teaches the next."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load

from checkpoints.parity import assert_close
from checkpoints.requests import make_request
from checkpoints.services import error_of, result_of, run_service
from checkpoints.stages import InProcessStages
from triton_diffusion.config import StageConfig
from triton_diffusion.errors import ResourceExhaustedError, WorkerGroupError
from triton_diffusion.runtime.faults import VARIABLE
from triton_diffusion.runtime.last_words import LastWords, read_last_words, write_last_words
from triton_diffusion.runtime.service import StageService

TOKENS = 24 + 8 * 8
"""Of a row of make_request: 24 text tokens, 32 x 32 pixels in tokens of 4 x 4."""
TWO_RANKS = {"num_gpus": 2, "dp_size": 1, "ulysses_degree": 2}
"""They share every forward pass, so that one waits for the other in the middle of it."""


# The file.


def test_the_first_words_count_whichever_rank_says_them(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert read_last_words(folder) is None
    write_last_words(folder, 1, LastWords(message="no memory", too_large={"a": "too large"}))
    write_last_words(folder, 0, LastWords(message="rank 1 does not answer"))
    (tmp_path / "rank-2.last-words").write_text("{")
    words = read_last_words(folder)
    assert words is not None
    assert (words.message, words.too_large) == ("rank 1: no memory", {"a": "too large"})


def test_words_are_taken_back(tmp_path: Path) -> None:
    for words in (LastWords(message="no memory"), None, None):
        write_last_words(str(tmp_path), 0, words)
    assert read_last_words(str(tmp_path)) is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_no_error(tmp_path: Path) -> None:
    write_last_words(str(tmp_path / "gone"), 0, LastWords(message="no memory"))
    assert read_last_words(str(tmp_path / "gone")) is None


# Groups.


def test_memory_that_is_too_small_on_one_rank_costs_no_request_but_those_that_do_not_fit_alone(
    flux_checkpoint: Path, in_process: InProcessStages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its group is killed as one that hangs, long before the rank would give up waiting for the others."""
    monkeypatch.setenv("TRITON_DIFFUSION_CACHE", str(tmp_path))
    monkeypatch.setenv(VARIABLE, f"oom_tokens={2 * TOKENS};rank=1")
    options = {**TWO_RANKS, "max_batch_tokens": 4 * TOKENS, "warmup_resolutions": "none"}
    small = {name: make_request(seed=seed, num_inference_steps=8) for seed, name in enumerate("abcd")}
    large = make_request(height=64, width=64)
    blobs = {name: in_process.encode(name, request) for name, request in {**small, "large": large}.items()}
    with run_service("denoising", flux_checkpoint, watchdog_floor_s=1.0, watchdog_ceiling_s=2.0, **options) as caller:
        futures = {name: caller.send(blob) for name, blob in blobs.items()}
        for name, request in small.items():
            assert_close(load(result_of(futures[name]))["latents"], in_process.latents(request))
        error = error_of(futures["large"])
        metrics = caller.service.metrics()
    assert isinstance(error, ResourceExhaustedError)
    assert str(error).startswith("64x64 (height x width, 280 tokens) does not fit in the memory of cpu in denoising")
    assert metrics.max_batch_tokens == 2 * TOKENS
    assert (metrics.restarts_total, metrics.requests_given_up_total) == (2, 0)


@pytest.fixture
def program_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the ranks run some lines before their program; `rank` is the number of theirs."""

    def begin_with(lines: str) -> None:
        program = tmp_path / "program"
        program.write_text(
            f"#!{sys.executable}\n"
            "import runpy, sys\n"
            "rank = int(sys.argv[sys.argv.index('--rank') + 1])\n"
            f"{lines}\n"
            "runpy.run_module(sys.argv[2], run_name='__main__', alter_sys=True)\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return begin_with


def test_a_rank_that_fails_alone_while_it_warms_up_ends_the_start_and_gives_the_reason(
    flux_checkpoint: Path, program_of_ranks: Callable[[str], None]
) -> None:
    program_of_ranks(
        "from triton_diffusion.runtime.calibration import WarmUp\n"
        "def fail(*_): raise MemoryError('nothing left')\n"
        "if rank == 1: WarmUp._admit = fail"
    )
    service = StageService("denoising", StageConfig(model_path=str(flux_checkpoint), num_threads=1, **TWO_RANKS))
    with pytest.raises(WorkerGroupError, match=r"rank 1: MemoryError: nothing left \(rank 1 \(pid"):
        service.start()


def test_a_start_that_ends_of_memory_on_one_rank_is_tried_again_with_smaller_batches(
    flux_checkpoint: Path, program_of_ranks: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_DIFFUSION_CACHE", str(tmp_path))
    tokens = 48 + 8 * 8
    monkeypatch.setenv(VARIABLE, f"oom_tokens={tokens};rank=1")
    program_of_ranks("from triton_diffusion.distributed import group\ngroup.RANKS_TIMEOUT_S = 1.0")
    with run_service("denoising", flux_checkpoint, **TWO_RANKS) as caller:
        assert caller.service.metrics().max_batch_tokens == tokens
        assert caller.service.metrics().restarts_total == 1
