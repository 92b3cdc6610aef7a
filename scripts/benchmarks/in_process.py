"""diffusers' FluxPipeline in a process of its own: what a program has that calls diffusers and no server."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.picture import PictureRequest
from benchmarks.variables import environment, tuning_variables


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the pipeline runs."""

    model_path: str
    dtype: str
    """A name of torch, or "auto" as in StageConfig."""
    num_threads: int
    tuning: Mapping[str, str]
    """`tuning_variables` of the process's environment; empty: the libraries' defaults."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one call of the pipeline made."""

    latency_s: float
    parts_s: Mapping[str, float]
    """text encoding, denoising, its steps, decoding."""
    array: NDArray[Any]
    """Pixels uint8 (H, W, 3), or latents float32 (S, C) where those were asked for."""


class InProcessPipeline:
    """The pipeline's process, a context manager; it idles while it is not asked."""

    dtype: str
    """What the pipeline computes in."""

    def __init__(self, setup: Setup) -> None:
        """Start loading; `__enter__` waits until it is done."""
        # Forking would copy threads and settings of this process; spawning starts clean.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, setup), name="pipeline", daemon=True)
        # malloc reads its variables before any of our code runs there.
        with environment(setup.tuning):
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    def generate(self, request: PictureRequest, *, latents: bool = False) -> Result:
        """Draw one picture; with `latents` stop before it is decoded."""
        self._connection.send((request, latents))
        result: Result = self._receive()
        return result

    def generate_batch(self, requests: Sequence[PictureRequest]) -> float:
        """Draw pictures that differ in nothing but prompt and seed in one call; its seconds."""
        self._connection.send(list(requests))
        latency_s: float = self._receive()
        return latency_s

    def _receive(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> Self:
        self.dtype = self._receive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(timeout=5 if error is None else 0)
        self._process.kill()
        self._process.join()


def _run(connection: Connection, setup: Setup) -> None:
    """The process: the pipeline's answer to each request, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # tqdm's own lock is one between processes, which is reported as leaked when this process is killed.
    tqdm.set_lock(threading.RLock())
    for name in tuning_variables(os.environ):
        del os.environ[name]
    os.environ.update(setup.tuning, TOKENIZERS_PARALLELISM="false")
    # Only now: OpenMP reads the environment when torch is imported.
    from benchmarks.pipeline import TimedPipeline

    try:
        pipeline = TimedPipeline(setup.model_path, setup.dtype, setup.num_threads)
        connection.send(pipeline.dtype)
    except Exception as error:
        connection.send(error)
        return
    while True:
        try:
            match connection.recv():
                case list() as batch:
                    connection.send(pipeline.generate_batch(batch))
                case (request, latents):
                    latency_s, parts_s, array = pipeline.generate(request, latents=latents)
                    connection.send(Result(latency_s=latency_s, parts_s=parts_s, array=np.ascontiguousarray(array)))
        except (EOFError, BrokenPipeError):
            return
        except Exception as error:
            connection.send(error)
