"""A worker group: the rank processes of one replica, started, watched and ended by the service."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable

import zmq

from triton_diffusion import run_folder
from triton_diffusion.config import StageConfig
from triton_diffusion.runtime import messages
from triton_diffusion.runtime.last_words import LastWords, read_last_words
from triton_diffusion.runtime.messages import FromRanks, Message, RankLaunch, Shutdown
from triton_diffusion.runtime.rank_process import RankProcess, group_cores, more_cores

logger = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 5.0


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
        service_started_s: float,
        context: zmq.Context[zmq.Socket[bytes]],
        start: Callable[[int, int], RankProcess],
    ) -> None:
        """Args:
        start: a process for (replica, rank); raises OSError when the system starts no more.
        """
        self._stage_model = stage_model
        self._model_path = model_path
        self._config = config
        self.replica = replica
        self._service_started_s = service_started_s
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
        self._ranks: list[RankProcess] = []
        try:
            for rank in range(config.ranks_per_replica):
                self._ranks.append(start(replica, rank))
                self._ranks[-1].launch(self._launch(rank))
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
        return [rank.pid for rank in self._ranks]

    def send(self, message: Message) -> None:
        """Queue a message for rank 0; never blocks.

        A rank 0 that has closed its socket is on its way out: it is ended here, and `describe_death` tells of it.
        """
        try:
            self.socket.send(messages.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self._ranks[0].kill()

    def receive(self) -> FromRanks | None:
        """The next message for the service, or None when there is none yet."""
        try:
            return messages.decode_from_ranks(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def describe_death(self) -> str | None:
        """Which ranks have ended and how, or None while all are alive."""
        ended = [f"rank {index} {end}" for index, rank in enumerate(self._ranks) if (end := rank.describe_end())]
        return "; ".join(ended) or None

    def last_words(self) -> LastWords | None:
        """What the ranks have left to say of their end, if anything."""
        return read_last_words(self._run_dir)

    def stopped_ranks(self) -> list[int]:
        """Ranks that a signal has stopped (SIGSTOP), and that nothing has let go on yet."""
        return [index for index, rank in enumerate(self._ranks) if rank.is_stopped]

    def kill(self) -> None:
        """Send SIGKILL to all ranks; does not wait for their end."""
        for rank in self._ranks:
            rank.kill()

    def have_ended(self) -> bool:
        """Whether no rank is left; until then they may hold the memory of their devices."""
        return all(rank.has_ended for rank in self._ranks)

    def close(self) -> None:
        """Remove what the ranks leave, when they have ended."""
        for rank in self._ranks:
            rank.close()
        self.socket.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    def stop(self, *, graceful: bool) -> None:
        """End all ranks, wait for that, and remove what they leave; those that do not end by themselves are killed."""
        if graceful:
            self.send(Shutdown())
            for rank in self._ranks:
                if not rank.wait(_SHUTDOWN_TIMEOUT_S):
                    logger.warning("pid %d does not end, killing it", rank.pid)
        self.kill()
        for rank in self._ranks:
            rank.wait()
        self.close()

    def _launch(self, rank: int) -> RankLaunch:
        config = self._config
        return RankLaunch(
            stage_model=self._stage_model,
            model_path=self._model_path,
            dtype=config.dtype,
            num_threads=config.threads_per_rank,
            cores=group_cores(config, self.replica) if config.take_turns else [],
            more_cores=more_cores(config, self.replica) if config.take_turns else [],
            rank=rank,
            group_size=config.ranks_per_replica,
            replica=self.replica,
            service_started_s=self._service_started_s,
            max_batch_tokens=config.max_batch_tokens,
            warmup_sizes=config.warmup_sizes(),
            checkpoint_steps=config.checkpoint_steps,
            prompt_cache_bytes=config.prompt_cache_bytes,
            parallel=config.parallel(self._stage_model),
            attention_backend=config.attention_backend,
            pack_linears=config.pack_linears,
            vae_tiling=config.vae_tiling,
            run_dir=self._run_dir,
            endpoint=self._endpoint,
        )
