"""Stage services with real rank processes. A rank takes seconds to start, so tests share services where they can."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from checkpoints.requests import make_request
from triton_diffusion.config import StageConfig
from triton_diffusion.errors import DiffusionError
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.runtime.held_request import Answer
from triton_diffusion.runtime.service import StageService
from triton_diffusion.state import (
    CancelOrder,
    Progress,
    ProgressQuery,
    StageHealth,
    read_health,
    read_num_cancelled,
    read_progress,
    write_cancel_order,
    write_health_query,
    write_progress_query,
)

TIMEOUT_S = 60


class Caller:
    """Asks a service, and waits for its answers."""

    def __init__(self, service: StageService) -> None:
        self.service = service

    def send(self, blob: bytes) -> Future[Answer]:
        """Hand in a blob; an answer that comes twice fails in the service's thread."""
        future: Future[Answer] = Future()
        self.service.submit(blob, future.set_result)
        return future

    def run(self, blob: bytes) -> bytes:
        """The result of a request; raises its error."""
        return result_of(self.send(blob))

    def cancel(self, request_id: str) -> int:
        """How many requests were cancelled."""
        return read_num_cancelled(self.run(write_cancel_order(CancelOrder([request_id]))))

    def progress(self, request_id: str, after_step: int, after_restarts: int = 0) -> tuple[Progress, bytes | None]:
        """Waits until the request has done more than `after_step` steps, or was started anew more often."""
        return read_progress(self.run(write_progress_query(ProgressQuery(request_id, after_step, after_restarts))))

    def health(self) -> StageHealth:
        """What the service says of itself."""
        return read_health(self.run(write_health_query()))

    def pids(self, replica: int = 0) -> list[int]:
        """The rank processes of a replica, rank 0 first."""
        group = self.service._replicas[replica].group
        return [] if group is None else group.pids


def result_of(future: Future[Answer]) -> bytes:
    answer = future.result(TIMEOUT_S)
    if isinstance(answer, DiffusionError):
        raise answer
    return answer


def error_of(future: Future[Answer]) -> DiffusionError:
    answer = future.result(TIMEOUT_S)
    assert isinstance(answer, DiffusionError), "it has a result"
    return answer


@contextmanager
def run_service(stage_model: str, folder: Path, **values: Any) -> Iterator[Caller]:
    """A service that has started."""
    settings: dict[str, Any] = {
        "model_path": str(folder),
        "dtype": "float32",
        "num_threads": 1,
        "startup_timeout_s": 120.0,
        # Tests cancel requests of any number of steps.
        "max_queue_cost": 10**12,
        # They take the cores from the other tests.
        "spare_ranks": False,
    }
    service = StageService(stage_model, StageConfig(**settings | values))
    service.start()
    try:
        yield Caller(service)
    finally:
        service.stop()


@contextmanager
def run_services(folder: Path, **values: Any) -> Iterator[dict[str, Caller]]:
    """All stage models that a request without pictures needs, started at the same time."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(stage_model: str) -> Caller:
            return stack.enter_context(run_service(stage_model, folder, **values))

        stages = [*find_family(open_checkpoint(str(folder))).encoders(make_request()), "denoising", "decoding"]
        yield dict(zip(stages, pool.map(start, stages), strict=True))
