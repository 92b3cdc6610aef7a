"""The process of one rank, as the service sees it: started, told what to run, watched and killed."""

from __future__ import annotations

import glob
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from triton_diffusion.config import StageConfig
from triton_diffusion.runtime.messages import RankLaunch

logger = logging.getLogger(__name__)


class RankProcess:
    """A process that imports what its rank needs and then waits for its launch."""

    def __init__(self, stage_model: str, model_path: str, config: StageConfig, replica: int, rank: int) -> None:
        """Start it.

        Raises:
            OSError: the system starts no more processes.
        """
        device_id = config.device_ids()[replica][rank]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "triton_diffusion.runtime.rank_main"),
                *("--stage", stage_model, "--replica", str(replica), "--rank", str(rank)),
                *("--model-path", model_path),
            ],
            stdin=subprocess.PIPE,
            env=_rank_environment(os.environ, device_id, config.threads_per_rank, first_core(config, replica, rank)),
        )
        self.pidfd = os.pidfd_open(self._process.pid)
        """Readable when the process has ended."""

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def launch(self, launch: RankLaunch) -> None:
        """Tell it what to run, once."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            logger.debug("pid %d ended before it was told what to do", self.pid)

    @property
    def has_ended(self) -> bool:
        """Whether it is gone, and with it what it held of its device."""
        return self._process.poll() is not None

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it (SIGSTOP), and nothing has let it go on yet."""
        return _process_state(self.pid) == "T"

    def describe_end(self) -> str | None:
        """How it ended; None while it is alive."""
        code = self._process.poll()
        if code is None:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"(pid {self.pid}) {how}"

    def kill(self) -> None:
        """Send SIGKILL; does not wait for the end."""
        self._process.kill()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False if it did not come in time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Close what is open here for a process that has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self.pidfd)


def first_core(config: StageConfig, replica: int, rank: int) -> int:
    """Where the cores of a rank begin among those that we may use."""
    return (replica * config.ranks_per_replica + rank) * config.cores_per_rank


def group_cores(config: StageConfig, replica: int) -> list[int]:
    """The cores that a batch of a replica waits for, those of all its ranks; none where there are GPUs."""
    num_cores = config.ranks_per_replica * config.cores_per_rank
    return [] if has_gpus() else _cores_from(first_core(config, replica, 0), num_cores)


def more_cores(config: StageConfig, replica: int) -> list[int]:
    """The cores for further threads of a replica's rank; none where there are GPUs."""
    num_cores = config.threads_per_rank - config.cores_per_rank
    return [] if has_gpus() else _cores_from(first_core(config, replica + 1, 0), num_cores)


def has_gpus() -> bool:
    """Whether this machine has GPUs that ranks run on."""
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def _rank_environment(base: Mapping[str, str], device_id: str, num_threads: int, first_core: int) -> dict[str, str]:
    """Read by torch when it is imported, so it must be in place before the process starts."""
    environment = _openmp_variables(num_threads, first_core) | _malloc_variables() | dict(base)
    return environment | {
        "CUDA_VISIBLE_DEVICES": _visible_device(base, device_id),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }


def _openmp_variables(num_threads: int, first_core: int) -> dict[str, str]:
    """How the threads of a rank on the CPU share the cores with other processes; the operator's own settings go first.

    Measured on 2 cores with the demo checkpoint, 20 steps: 343 ms a picture with threads that never spin, 293 ms with
    OpenMP's defaults, 216 ms like this, and 9.8 instead of 5.5 pictures a second for 16 clients. A thread that every
    message wakes on its sibling's core waits there for a time slice of milliseconds, at every step: so each has a core.
    Threads that spin for long take the cores from the ranks of other stages: so they spin for microseconds.
    """
    if num_threads == 1 or has_gpus():
        return {}
    places = [f"{{{core}}}" for core in _cores_from(first_core, num_threads)]
    return {"OMP_PROC_BIND": "true", "OMP_PLACES": ",".join(places), "GOMP_SPINCOUNT": "4000"}


def _malloc_variables() -> dict[str, str]:
    """How a rank on the CPU keeps memory that it has freed; the operator's own settings go first.

    By its defaults glibc gives the activations of a batch back to the system at every step, which fills the same pages
    with zeros again at the next. Measured on 2 cores with the demo checkpoint: a step of 8 rows 25 and of 16 rows
    48 ms, and 20 and 35 ms like this. Both are needed: a trim threshold alone maps every tensor anew (115 ms). 32 MiB
    is the most that glibc takes (mallopt(3)).
    """
    if has_gpus():
        return {}
    return {"MALLOC_TRIM_THRESHOLD_": str(512 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}


def _cores_from(first: int, count: int) -> list[int]:
    """The numbers of `count` cores of those that we may use, behind the last one from the front again."""
    cores = sorted(os.sched_getaffinity(0))
    return [cores[(first + index) % len(cores)] for index in range(count)]


def _visible_device(base: Mapping[str, str], device_id: str) -> str:
    """Ids count within what the operator made visible, as everywhere in CUDA; an empty list switches GPUs off."""
    visible = base.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not device_id.isdigit():
        return device_id
    ids = [item.strip() for item in visible.split(",") if item.strip()]
    if not ids:
        return ""
    # -1 is no device: the rank says that it is missing.
    return ids[int(device_id)] if int(device_id) < len(ids) else "-1"


def _process_state(pid: int) -> str:
    """The letter of /proc/PID/stat, such as "T" for a process that was stopped; empty when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # Behind the name of the program, which may hold brackets and blanks.
    return text.rpartition(")")[2].split()[0]
