"""A worker group: the rank processes of one replica, started, watched and ended by the service."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from triton_diffusion import run_folder
from triton_diffusion.config import StageConfig
from triton_diffusion.runtime import messages
from triton_diffusion.runtime.messages import FromRanks, Message, RankLaunch, Shutdown

logger = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 5.0


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    pidfd: int


class WorkerGroup:
    """The ranks of one replica.

    `sources` are for the service's poller: the socket has messages of rank 0, and each of `pidfds` becomes readable
    when its rank has died.
    """

    def __init__(
        self,
        *,
        stage_model: str,
        model_path: str,
        config: StageConfig,
        replica: int,
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        self._stage_model = stage_model
        self._model_path = model_path
        self._config = config
        self.replica = replica
        # The folder is open to this user alone; in it are the socket and the file that the ranks meet at.
        # Inside that of the server, if there is one: who kills all processes at once removes that.
        self._run_dir = tempfile.mkdtemp(prefix="triton-diffusion-", dir=run_folder.find())
        socket_path = os.path.join(self._run_dir, "ranks")
        self._endpoint = f"ipc://{socket_path}"
        self.socket = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.bind(self._endpoint)
        os.chmod(socket_path, 0o600)
        self._ranks: list[_Rank] = []
        try:
            for rank in range(config.ranks_per_replica):
                self._ranks.append(self._spawn(rank))
        except BaseException:
            self.stop(graceful=False)
            raise

    @property
    def pidfds(self) -> list[int]:
        """One file descriptor a rank."""
        return [rank.pidfd for rank in self._ranks]

    @property
    def sources(self) -> list[zmq.Socket[bytes] | int]:
        """All that the service's poller shall watch."""
        return [self.socket, *self.pidfds]

    @property
    def pids(self) -> list[int]:
        """Process ids, rank 0 first."""
        return [rank.process.pid for rank in self._ranks]

    def send(self, message: Message) -> None:
        """Queue a message for rank 0; never blocks.

        A rank 0 that has closed its socket is on its way out: it is ended here, and `describe_death` tells of it.
        """
        try:
            self.socket.send(messages.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self._ranks[0].process.kill()

    def receive(self) -> FromRanks | None:
        """The next message for the service, or None when there is none yet."""
        try:
            return messages.decode_from_ranks(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def describe_death(self) -> str | None:
        """Which ranks have ended and how, or None while all are alive."""
        ended = []
        for index, rank in enumerate(self._ranks):
            code = rank.process.poll()
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                ended.append(f"rank {index} (pid {rank.process.pid}) {how}")
        return "; ".join(ended) or None

    def stopped_ranks(self) -> list[int]:
        """Ranks that a signal has stopped (SIGSTOP), and that nothing has let go on yet."""
        return [index for index, rank in enumerate(self._ranks) if _process_state(rank.process.pid) == "T"]

    def kill(self) -> None:
        """Send SIGKILL to all ranks; does not wait for their end."""
        for rank in self._ranks:
            rank.process.kill()

    def have_ended(self) -> bool:
        """Whether no rank is left; until then they may hold the memory of their devices."""
        return all(rank.process.poll() is not None for rank in self._ranks)

    def close(self) -> None:
        """Remove what the ranks leave, when they have ended."""
        for rank in self._ranks:
            assert rank.process.stdin is not None
            rank.process.stdin.close()
            os.close(rank.pidfd)
        self.socket.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    def stop(self, *, graceful: bool) -> None:
        """End all ranks, wait for that, and remove what they leave; those that do not end by themselves are killed."""
        if graceful:
            self.send(Shutdown())
            for rank in self._ranks:
                try:
                    rank.process.wait(_SHUTDOWN_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    logger.warning("pid %d does not end, killing it", rank.process.pid)
        self.kill()
        for rank in self._ranks:
            rank.process.wait()
        self.close()

    def _spawn(self, rank: int) -> _Rank:
        launch = RankLaunch(
            stage_model=self._stage_model,
            model_path=self._model_path,
            dtype=self._config.dtype,
            num_threads=self._config.threads_per_rank,
            cores=self._cores() if self._config.take_turns else [],
            rank=rank,
            group_size=self._config.ranks_per_replica,
            replica=self.replica,
            max_batch_tokens=self._config.max_batch_tokens,
            warmup_sizes=self._config.warmup_sizes(),
            checkpoint_steps=self._config.checkpoint_steps,
            prompt_cache_bytes=self._config.prompt_cache_bytes,
            parallel=self._config.parallel(self._stage_model),
            attention_backend=self._config.attention_backend,
            vae_tiling=self._config.vae_tiling,
            run_dir=self._run_dir,
            endpoint=self._endpoint,
        )
        first_core = self._first_core(rank)
        device_id = self._config.device_ids()[self.replica][rank]
        process = subprocess.Popen(
            # The names are for whoever looks at a list of processes; the rank itself reads its launch.
            [
                *(sys.executable, "-m", "triton_diffusion.runtime.rank"),
                *("--stage", self._stage_model, "--replica", str(self.replica), "--rank", str(rank)),
            ],
            stdin=subprocess.PIPE,
            env=_rank_environment(os.environ, device_id, launch.num_threads, first_core),
        )
        _write_line(process, launch)
        return _Rank(process, os.pidfd_open(process.pid))

    def _first_core(self, rank: int) -> int:
        return (self.replica * self._config.ranks_per_replica + rank) * self._config.threads_per_rank

    def _cores(self) -> list[int]:
        """The cores that the threads of all ranks are meant for; none where there are GPUs."""
        num_cores = self._config.ranks_per_replica * self._config.threads_per_rank
        return [] if _has_gpus() else _cores_from(self._first_core(0), num_cores)


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
    if num_threads == 1 or _has_gpus():
        return {}
    places = [f"{{{core}}}" for core in _cores_from(first_core, num_threads)]
    return {"OMP_PROC_BIND": "true", "OMP_PLACES": ",".join(places), "GOMP_SPINCOUNT": "4000"}


def _malloc_variables() -> dict[str, str]:
    """How a rank on the CPU keeps memory that it has freed; the operator's own settings go first.

    By its defaults glibc gives the activations of a batch back to the system at every step, which fills the same pages
    with zeros again at the next. Measured on 2 cores with the demo checkpoint: a step of 8 rows 25 and of 16 rows 48 ms,
    and 20 and 35 ms like this. Both are needed: a trim threshold alone maps every tensor anew (115 ms). 32 MiB is the
    most that glibc takes (mallopt(3)).
    """
    if _has_gpus():
        return {}
    return {"MALLOC_TRIM_THRESHOLD_": str(512 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}


def _has_gpus() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*"))


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


def _write_line(process: subprocess.Popen[bytes], value: msgspec.Struct) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(value) + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        logger.debug("pid %d ended before it was told what to do", process.pid)
