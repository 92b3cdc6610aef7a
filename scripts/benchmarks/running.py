"""A server for the time of a benchmark, and a look at its processes."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks.report import Figure
from benchmarks.variables import tuning_variables
from triton_diffusion.commands import ProgressLine
from triton_diffusion.repository import build_repository
from triton_diffusion.runtime.rank_main import SPARE_NAME
from triton_diffusion.runtime.work import STAGE_MODELS
from triton_diffusion.server import TritonServer

LOG_FILE = Path("outputs") / "benchmark_tritonserver.log"
_SPARES_TIMEOUT_S = 300.0
_RESTING_PERCENT = 5.0


@contextlib.contextmanager
def prepared_server(settings: Mapping[str, str], *, stages: Collection[str] = STAGE_MODELS) -> Iterator[TritonServer]:
    """A server that has not been started, for the models in the repository with `settings`."""
    with tempfile.TemporaryDirectory(prefix="triton-diffusion-models-") as folder:
        build_repository(folder, settings, stages=stages)
        yield TritonServer(
            folder,
            log_file=LOG_FILE,
            exit_timeout_s=30,
            extra_arguments=["--disable-auto-complete-config"],
            temporary_folders=[folder],
        )


@contextlib.contextmanager
def running_server(settings: Mapping[str, str], *, stages: Collection[str] = STAGE_MODELS) -> Iterator[TritonServer]:
    """A server that is ready, and whose spare ranks have imported what they need."""
    with prepared_server(settings, stages=stages) as server, server:
        progress = ProgressLine(is_alone=True)
        server.wait_until_ready(on_progress=progress.show)
        progress.end()
        if settings.get("spare_ranks") != "false":
            wait_for_spares(server)
        yield server


def wait_for_spares(server: TritonServer) -> None:
    """Return when each rank has a spare that rests; what they do before would count as work of the first requests."""
    deadline_s = time.monotonic() + _SPARES_TIMEOUT_S
    with tqdm(desc="spare ranks", unit="rank", bar_format="{desc}: {n_fmt} of {total_fmt} [{elapsed}]") as progress:
        while time.monotonic() < deadline_s:
            processes = psutil.Process(server.pid).children(recursive=True)
            spares = [process for process in processes if process.name() == SPARE_NAME]
            progress.total = sum(rank_arguments(process) is not None for process in processes)
            for process in spares:
                process.cpu_percent()
            time.sleep(1.0)
            progress.n = sum(process.cpu_percent() < _RESTING_PERCENT for process in spares)
            progress.refresh()
            if progress.n == progress.total:
                return
    raise TimeoutError(f"{progress.n} of {progress.total} spare ranks are up after {_SPARES_TIMEOUT_S:g} s")


def named_processes(server: TritonServer) -> dict[str, psutil.Process]:
    """The processes of a server under names that say what they are for; those that are just ending are left out."""
    root = psutil.Process(server.pid)
    named = {"tritonserver": root}
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            named[_name(process, server.pid)] = process
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("_server_guard" in word for word in child.cmdline()):
                named["server guard"] = child
    return named


def _name(process: psutil.Process, server_pid: int) -> str:
    """A restarted process has the name of the one before it."""
    parent = process.parent()
    if parent is not None and parent.pid == server_pid and (model := _model_of(process)) is not None:
        return f"{model}, stub"
    if parent is not None and (place := rank_arguments(process)) is not None:
        return f"{_model_of(parent)}, rank {place[1]}.{place[2]}"
    return f"{process.name()} {process.pid}"


def rank_arguments(process: psutil.Process) -> tuple[str, int, int] | None:
    """(stage, replica, rank) of a rank process, which its command line tells; None for any other process."""
    arguments = process.cmdline()
    if "triton_diffusion.runtime.rank_main" not in arguments or process.name() == SPARE_NAME:
        return None
    stage, replica, rank = (arguments[arguments.index(flag) + 1] for flag in ("--stage", "--replica", "--rank"))
    return stage, int(replica), int(rank)


def _model_of(process: psutil.Process) -> str | None:
    """The model of a stub, whose second argument is `<repository>/<model>/<version>/model.py`."""
    arguments = process.cmdline()
    if len(arguments) > 1 and arguments[1].endswith("/model.py"):
        return Path(arguments[1]).parts[-3]
    return None


def shared_memory_segments() -> list[tuple[Path, int]]:
    """Those of this process's servers and the bytes they take; a part that was never written takes nothing."""
    found = []
    for segment in Path("/dev/shm").glob(f"triton_diffusion_{os.getpid()}_*"):
        with contextlib.suppress(FileNotFoundError):
            found.append((segment, segment.stat().st_blocks * 512))
    return found


def wait_until_ready(server: TritonServer, *, poll_s: float) -> None:
    """As the server's own `wait_until_ready`, which looks twice a second, but as often as a timing needs."""
    while not server.is_ready():
        if server.wait(poll_s) is not None:
            server.wait_until_ready()  # starts it again, or says what is wrong


def tuning_of_ranks(server: TritonServer) -> dict[str, str]:
    """How the server's ranks use threads and memory: `tuning_variables` of their environment."""
    return tuning_variables(named_processes(server)["denoising, rank 0.0"].environ())


def busy_figure() -> Figure:
    """How much of the cores others take while we do nothing; warns where that spoils the figures."""
    time.sleep(1.0)
    busy_percent = psutil.cpu_percent(interval=2.0)
    if busy_percent > 5:
        print(f"warning: the processor is {busy_percent:.0f} % busy with other work; expect noise", file=sys.stderr)
    return Figure(name="processor busy with other work before the run", value=busy_percent, unit="%")
