"""A worker group: the rank processes of one replica, started, watched and ended by the service."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import zmq

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
        # The folder is only open to this user, and so is the socket in it.
        self._run_dir = tempfile.mkdtemp(prefix="triton-diffusion-")
        self._endpoint = f"ipc://{self._run_dir}/ranks"
        self.socket = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.bind(self._endpoint)
        # The ranks meet at a store on a free port: opened here, so that nobody takes it, and served by rank 0.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._ranks = [self._spawn(rank, listener) for rank in range(config.ranks_per_replica)]

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

    def stop(self, *, graceful: bool) -> None:
        """End all ranks and remove what they leave; ranks that do not end by themselves are killed."""
        if graceful:
            self.send(Shutdown())
            for rank in self._ranks:
                try:
                    rank.process.wait(_SHUTDOWN_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    logger.warning("pid %d does not end, killing it", rank.process.pid)
        for rank in self._ranks:
            rank.process.kill()
            rank.process.wait()
            assert rank.process.stdin is not None
            rank.process.stdin.close()
            os.close(rank.pidfd)
        self.socket.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    def _spawn(self, rank: int, listener: socket.socket) -> _Rank:
        launch = RankLaunch(
            stage_model=self._stage_model,
            model_path=self._model_path,
            dtype=self._config.dtype,
            num_threads=self._config.threads_per_rank,
            rank=rank,
            group_size=self._config.ranks_per_replica,
            replica=self.replica,
            max_batch_tokens=self._config.max_batch_tokens,
            warmup_sizes=self._config.warmup_sizes(),
            prompt_cache_bytes=self._config.prompt_cache_bytes,
            parallel=self._config.parallel(self._stage_model),
            attention_backend=self._config.attention_backend,
            vae_tiling=self._config.vae_tiling,
            run_dir=self._run_dir,
            endpoint=self._endpoint,
            store_port=listener.getsockname()[1],
            store_fd=listener.fileno(),
        )
        first_core = (self.replica * self._config.ranks_per_replica + rank) * launch.num_threads
        device_id = self._config.device_ids()[self.replica][rank]
        process = subprocess.Popen(
            [sys.executable, "-m", "triton_diffusion.runtime.rank"],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()] if rank == 0 and launch.group_size > 1 else [],
            env=_rank_environment(os.environ, device_id, launch.num_threads, first_core),
        )
        _write_line(process, launch)
        return _Rank(process, os.pidfd_open(process.pid))


def _rank_environment(base: Mapping[str, str], device_id: str, num_threads: int, first_core: int) -> dict[str, str]:
    """Read by torch when it is imported, so it must be in place before the process starts."""
    environment = _openmp_variables(num_threads, first_core) | dict(base)
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
    if num_threads == 1 or glob.glob("/dev/nvidia[0-9]*"):
        return {}
    cores = sorted(os.sched_getaffinity(0))
    places = [f"{{{cores[(first_core + index) % len(cores)]}}}" for index in range(num_threads)]
    return {"OMP_PROC_BIND": "true", "OMP_PLACES": ",".join(places), "GOMP_SPINCOUNT": "4000"}


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


def _write_line(process: subprocess.Popen[bytes], value: msgspec.Struct) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(value) + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        logger.debug("pid %d ended before it was told what to do", process.pid)
