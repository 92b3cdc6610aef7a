"""Run a function on several real ranks: processes on gloo, forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from triton_diffusion.config import ParallelConfig

TIMEOUT_S = 100.0
"""For a run in all: ranks that wait for each other are ended by then."""

_CONTEXT = multiprocessing.get_context("forkserver")
# Each of these takes seconds to import, on every rank.
_CONTEXT.set_forkserver_preload(
    [
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video",
        "diffusers.models.transformers.transformer_flux",
        "diffusers.models.transformers.transformer_hunyuan_video",
        "diffusers.models.transformers.transformer_wan",
        "transformers.models.t5.modeling_t5",
        "triton_diffusion.distributed.transformer",
        "triton_diffusion.families.flux.denoise",
        "triton_diffusion.families.flux.parallelize",
        "triton_diffusion.families.hunyuan_video.encode",
        "triton_diffusion.loading.components",
        "triton_diffusion.runtime.stage_loading",
        "triton_diffusion.stages.plan",
    ]
)


def run_ranks(
    function: Callable[..., Any], parallel: ParallelConfig, *, num_ranks: int | None = None, **arguments: Any
) -> list[Any]:
    """What `function(group, **arguments)` returns on each rank of a new group.

    num_ranks: if it is not that of `parallel`.

    Raises:
        RuntimeError: a rank raised an exception, ended, or took too long.
    """
    size = num_ranks or parallel.num_ranks
    with tempfile.TemporaryDirectory(prefix="triton-diffusion-ranks-") as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _CONTEXT.Process(
                target=_run_rank, args=(sender, f"{folder}/store", rank, size, parallel, function, arguments)
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()
            ends_at = time.monotonic() + TIMEOUT_S
            answers = [_receive(rank, receiver, ends_at) for rank, (receiver, _) in enumerate(pipes)]
            for process in processes:
                process.join(TIMEOUT_S)
        finally:
            for process, (receiver, _) in zip(processes, pipes, strict=True):
                process.kill()
                process.join()
                receiver.close()
    errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error is not None]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [answer for _, answer in answers]


def _receive(rank: int, receiver: Connection, ends_at: float) -> tuple[str | None, Any]:
    if not receiver.poll(max(0.0, ends_at - time.monotonic())):
        raise RuntimeError(f"rank {rank} has not answered in {TIMEOUT_S:g} s")
    try:
        answer: tuple[str | None, Any] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} ended without an answer") from None
    return answer


def _run_rank(
    sender: Connection,
    store: str,
    rank: int,
    size: int,
    parallel: ParallelConfig,
    function: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    import torch
    import torch.distributed as dist

    from triton_diffusion.distributed.group import RankGroup

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    try:
        file_store = dist.FileStore(store, size) if size > 1 else None
        group = RankGroup(rank=rank, size=size, device=torch.device("cpu"), store=file_store, parallel=parallel)
        with torch.inference_mode():
            answer = function(group, **arguments)
        sender.send((None, answer))
        group.close()
    except Exception:
        sender.send((traceback.format_exc(), None))
