"""One rank of a worker group, from its launch to its end.

Standard input is the life line: its one line says what to run, and its end means that the Triton process is gone,
whatever it died of. A rank then ends at once, and rank 0 removes the folder with the group's socket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
import zmq
from torch._C._distributed_c10d import FileStore, Store

from triton_diffusion.distributed.group import RankGroup, RanksDivergedError
from triton_diffusion.errors import ConfigurationError, DiffusionError, to_wire
from triton_diffusion.runtime import messages
from triton_diffusion.runtime.calibration import (
    Calibration,
    WarmUp,
    alone_on_this_machine,
    cache_path,
    device_name,
    keep_memory_limit,
    read_calibration,
    uncalibrated,
    write_calibration,
)
from triton_diffusion.runtime.inbox import Inbox
from triton_diffusion.runtime.last_words import LastWords, write_last_words
from triton_diffusion.runtime.messages import (
    AdmitRequest,
    DropRequest,
    GroupReady,
    RankLaunch,
    RunTick,
    Shutdown,
)
from triton_diffusion.runtime.rank_executor import RankExecutor
from triton_diffusion.runtime.rank_process import has_gpus
from triton_diffusion.runtime.stage_loading import LoadedStage, load_stage
from triton_diffusion.runtime.turns import open_turns

logger = logging.getLogger(__name__)


def run(line: bytes, lifeline: BinaryIO) -> int:
    """Run a rank until it is told to end; returns the exit code.

    Args:
    line: its RankLaunch, in JSON.
    lifeline: standard input, from which that line was read.
    """
    launch = msgspec.json.decode(line, type=RankLaunch)
    name = f"{launch.stage_model}[{launch.replica}.{launch.rank}]"
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s")
    torch.set_num_threads(launch.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    channel = _ServiceChannel(launch) if launch.rank == 0 else None
    threading.Thread(target=_end_with_service, args=(lifeline, launch), daemon=True).start()
    try:
        _check_gpu()
        store = _rendezvous(launch)
        group = RankGroup(
            rank=launch.rank, size=launch.group_size, device=device, store=store, parallel=launch.parallel
        )
        _serve(_load(launch, group, channel), group, channel)
    except Exception as error:
        logger.error("this rank ends, and with it its group", exc_info=not isinstance(error, DiffusionError))
        # Ranks that diverged said before they waited for each other what it was about.
        if not isinstance(error, RanksDivergedError):
            write_last_words(launch.run_dir, launch.rank, LastWords(message=to_wire(error)[1]))
        # An orderly end would wait for the collectives that the other ranks will never enter.
        os._exit(1)
    group.close()
    return 0


class _ServiceChannel:
    """Rank 0's connection to the service."""

    def __init__(self, launch: RankLaunch) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(launch.endpoint)
        self._inbox = Inbox()
        self._turns = open_turns(launch.cores, counted=launch.stage_model == "denoising")
        self._more_turns = open_turns(launch.more_cores)
        self._turn = contextlib.ExitStack()
        self._num_cores = len(launch.cores)
        self.num_threads: int | None = None
        """For the tick that was received last; None: all that there are."""

    def send(self, message: messages.Message) -> None:
        self._socket.send(messages.encode(message))

    def receive(self) -> bytes:
        """The next message for the ranks, with all that has come by now taken into account.

        A tick comes when it is this group's turn on its cores; `end_turn` gives them to the next.
        """
        if not self._inbox:
            self._inbox.put(messages.decode_to_ranks(self._socket.recv()))
        self._take_in()
        if self._turns is not None and self._inbox.next_is_tick:
            self._turn.enter_context(self._turns.take())
            self._take_in()
        message = self._inbox.take()
        if self._more_turns is not None and isinstance(message, RunTick):
            idle = self._turn.enter_context(self._more_turns.take_idle()) if message.alone else 0
            self.num_threads = self._num_cores + idle
        return messages.encode(message)

    def end_turn(self) -> None:
        """The tick is through on all ranks."""
        self._turn.close()

    def _take_in(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._inbox.put(messages.decode_to_ranks(self._socket.recv(zmq.NOBLOCK)))


def _rendezvous(launch: RankLaunch) -> Store | None:
    """The store that the ranks of a group meet at: a file that other users cannot reach, as they could a port."""
    if launch.group_size == 1:
        return None
    return FileStore(os.path.join(launch.run_dir, "store"), launch.group_size)


def _check_gpu() -> None:
    """Raise ConfigurationError if this rank was given a GPU that it cannot use, though the machine has some."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not wanted or torch.cuda.is_available() or not has_gpus():
        return
    raise ConfigurationError(
        f"GPU {wanted} is not usable, though this machine has GPUs; check num_gpus, gpu_device_ids and "
        "CUDA_VISIBLE_DEVICES (set it empty to run on the CPU)"
    )


def _end_with_service(lifeline: BinaryIO, launch: RankLaunch) -> None:
    # Past the buffered reader, whose lock a thread that waits here would hold when the interpreter ends.
    while os.read(lifeline.fileno(), 1):
        pass
    if launch.rank == 0:
        _remove(launch.run_dir)
    os._exit(0)


def _remove(run_dir: str) -> None:
    """Remove the group's folder; a rank that is not gone yet may write its file anew meanwhile."""
    for _ in range(100):
        shutil.rmtree(run_dir, ignore_errors=True)
        if not os.path.exists(run_dir):
            return
        time.sleep(0.01)


def _load(launch: RankLaunch, group: RankGroup, channel: _ServiceChannel | None) -> RankExecutor:
    """Make the stage on this rank ready. What a rank raises here ends the group, whatever the others are at."""
    started = time.monotonic()
    stage = _load_stage(launch, group)
    if group.size > 1:
        stage.executor.on_failure = partial(write_last_words, launch.run_dir, launch.rank)
    calibration = _prepare(launch, stage, group)
    # The group is ready when the last rank has come so far.
    group.agree({})
    if channel is not None:
        channel.send(
            GroupReady(
                device=str(group.device),
                dtype=str(stage.components.dtype).removeprefix("torch."),
                load_s=time.monotonic() - started,
                max_batch_tokens=calibration.max_batch_tokens,
                measurements=calibration.measurements,
            )
        )
    return stage.executor


def _load_stage(launch: RankLaunch, group: RankGroup) -> LoadedStage:
    return load_stage(
        launch.stage_model,
        launch.model_path,
        group,
        dtype=choose_dtype(launch.dtype, group.device),
        attention_backend=launch.attention_backend,
        pack_linears=launch.pack_linears,
        vae_tiling=launch.vae_tiling,
        prompt_cache_bytes=launch.prompt_cache_bytes,
        checkpoint_steps=launch.checkpoint_steps,
    )


def _prepare(launch: RankLaunch, stage: LoadedStage, group: RankGroup) -> Calibration:
    """Settle max_batch_tokens and run what shall be warm; every rank calls this, and all return the same."""
    device = device_name(group.device)
    layout = (
        f"{group.size} ranks, {launch.parallel}, attention {launch.attention_backend}, tiles {launch.vae_tiling}, "
        f"packed linears {launch.pack_linears}"
    )
    path = cache_path(launch.stage_model, stage.components, num_threads=launch.num_threads, layout=layout)
    known = _read_calibration(path, launch, group)
    executor = stage.executor
    executor.on_memory_limit = partial(keep_memory_limit, path, device)
    if known is not None and known.memory_limit:
        executor.limit_memory(known.memory_limit)
        if group.is_main:
            logger.warning(
                "batches of more than %d tokens once ran out of memory and are not tried; if there is more memory now, "
                "delete %s and load the model anew",
                known.memory_limit,
                path,
            )
    warm_up = WarmUp(launch.stage_model, executor, stage.family, stage.components, group, _cores(launch))
    if not warm_up.can_run:
        limit = launch.max_batch_tokens or warm_up.tokens_of_default()
        return uncalibrated(device, executor.fitting(limit))
    if launch.max_batch_tokens:
        known = msgspec.structs.replace(known or uncalibrated(device), max_batch_tokens=launch.max_batch_tokens)
    elif known is None or not known.max_batch_tokens:
        known = _calibrate(warm_up, path, launch, group)
        if known.memory_limit:
            # Another replica may have learnt it.
            executor.limit_memory(known.memory_limit)
    executor.limit_batch(executor.fitting(known.max_batch_tokens))
    executor.limit_threads(known.threads_by_tokens)
    took = warm_up.warm_up(launch.warmup_sizes, executor.fitting(known.max_batch_tokens))
    executor.forget()
    return msgspec.structs.replace(
        known,
        max_batch_tokens=executor.fitting(known.max_batch_tokens),
        measurements=known.measurements or took,
    )


def _calibrate(warm_up: WarmUp, path: Path, launch: RankLaunch, group: RankGroup) -> Calibration:
    """Measure, and keep it for the next start; or take what another replica has measured meanwhile."""
    with alone_on_this_machine(path, _cores(launch)) if group.is_main else contextlib.nullcontext():
        known = _read_calibration(path, launch, group)
        if known is not None and known.max_batch_tokens:
            return known
        started = time.monotonic()
        measured = warm_up.calibrate(device_name(group.device))
        if group.is_main:
            write_calibration(path, measured)
    if group.is_main:
        logger.info(
            "max_batch_tokens=%d, measured in %.1f s: %s; threads of small batches: %s; kept in %s",
            measured.max_batch_tokens,
            time.monotonic() - started,
            ", ".join(f"{tokens} tokens {1000 * seconds:.1f} ms" for tokens, seconds in measured.measurements),
            ", ".join(f"up to {tokens} tokens {threads}" for tokens, threads in measured.threads_by_tokens) or "all",
            path,
        )
        if not measured.holds_for_later:
            logger.warning(
                "others used %.1f cores while this was measured, so the next start of the server will measure it again",
                measured.others_cores,
            )
    return measured


def _read_calibration(path: Path, launch: RankLaunch, group: RankGroup) -> Calibration | None:
    """What rank 0's file says, on every rank: the others may have none."""
    known = read_calibration(path, since_s=launch.service_started_s) if group.is_main else None
    data = group.broadcast_bytes(msgspec.json.encode(known) if group.is_main else None)
    return msgspec.json.decode(data, type=Calibration | None)


def _cores(launch: RankLaunch) -> list[int]:
    """Those that the group may compute on; empty where it takes no turns on them."""
    return [*launch.cores, *launch.more_cores]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type that a configuration's `dtype` means on `device`.

    "auto" is bfloat16 where the hardware multiplies in it (AVX512-BF16 or AMX on a CPU), else float32.
    """
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _serve(executor: RankExecutor, group: RankGroup, channel: _ServiceChannel | None) -> None:
    """Do what rank 0 hears, on all ranks, until Shutdown."""
    while True:
        data = group.broadcast_bytes(channel.receive() if channel else None)
        match messages.decode_to_ranks(data):
            case AdmitRequest() as message:
                executor.admit(message)
            case RunTick() as tick:
                done = executor.run(tick, channel.num_threads if channel else None)
                if channel:
                    channel.end_turn()
                    channel.send(done)
            case DropRequest(request_id=request_id):
                executor.drop(request_id)
            case Shutdown():
                return
