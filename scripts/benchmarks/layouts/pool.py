"""RankPool: processes that stand ready to be the ranks of one layout after the other."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from benchmarks.layouts.messages import Denoised, DenoiseJob, Failed

_SCRIPTS = Path(__file__).resolve().parents[2]


class RankPool:
    """Importing torch takes seconds a process, so each is started once and serves all layouts."""

    def __init__(self, program: Sequence[str] = ("benchmarks.layouts.program",)) -> None:
        """program: the module that ranks run, and its arguments."""
        self._program = program
        self._folder = tempfile.TemporaryDirectory(prefix="triton-diffusion-layouts-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._num_jobs = 0

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(1 if kind else 30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._folder.cleanup()

    def prepare(self, num_ranks: int) -> None:
        """Start processes until there are so many."""
        while len(self._processes) < num_ranks:
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(_SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "HF_HUB_OFFLINE": "1",
                "TQDM_DISABLE": "1",
            }
            command = [sys.executable, "-m", *self._program]
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            )

    def run(self, first: int = 0, **job: Any) -> list[Denoised]:
        """Run a DenoiseJob on as many ranks as its layout has, beginning with process `first`; one answer a rank.

        Raises:
            RuntimeError: a rank failed.
        """
        size = job["parallel"].num_ranks
        self.prepare(first + size)
        self._num_jobs += 1
        ranks = self._processes[first : first + size]
        for rank, process in enumerate(ranks):
            one = DenoiseJob(rank=rank, store=f"{self._folder.name}/store-{self._num_jobs}", **job)
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(one) + b"\n")
            process.stdin.flush()
        answers: list[Denoised] = []
        for rank, process in enumerate(ranks):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"rank {rank} ended with exit code {process.wait()}")
            answers.append(_read(line, rank))
        return answers


def _read(line: bytes, rank: int) -> Denoised:
    try:
        return msgspec.json.decode(line, type=Denoised)
    except msgspec.ValidationError:
        raise RuntimeError(f"rank {rank}: {msgspec.json.decode(line, type=Failed).error}") from None
