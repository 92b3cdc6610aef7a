"""Run a stage on the ranks that its StageParallelism names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load

from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.stages.base import PipelineStage, StageParallelism, StageRequest
from triton_diffusion.stages.packing import pack_tensors

# The status byte that rank 0 sends before its outputs.
_OK, _FAILED = b"\1", b"\0"


def run_stage(stage: PipelineStage[Any], batch: Sequence[Any], group: RankGroup) -> None:
    """Run `stage` on `batch`; every rank of the group must call this with equal batches.

    An exception stays on the rank that raised it; the caller has the ranks agree afterwards (RankGroup.agree), so this
    function never leaves one rank in a collective that another does not enter.
    """
    match stage.parallelism:
        case StageParallelism.REPLICATED | StageParallelism.CFG_PARALLEL:
            stage(batch)
        case StageParallelism.MAIN_RANK_ONLY:
            if group.is_main:
                stage(batch)
        case StageParallelism.MAIN_RANK_ONLY_AND_SEND_TO_OTHERS:
            _run_and_send(stage, batch, group)


def _run_and_send(stage: PipelineStage[StageRequest], batch: Sequence[StageRequest], group: RankGroup) -> None:
    if not group.is_main:
        received = group.broadcast_bytes(None)
        if received[:1] == _OK:
            _unpack(received[1:], batch, group.device)
        return
    try:
        stage(batch)
        payload = _OK + _pack(batch)
    except BaseException:
        group.broadcast_bytes(_FAILED)
        raise
    group.broadcast_bytes(payload)


def _pack(batch: Sequence[StageRequest]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    for index, item in enumerate(batch):
        tensors.update({f"{index}.{name}": tensor for name, tensor in item.outputs.items()})
    return pack_tensors(tensors)


def _unpack(data: bytes, batch: Sequence[StageRequest], device: torch.device) -> None:
    for key, tensor in load(data).items():
        index, name = key.split(".", 1)
        batch[int(index)].outputs[name] = tensor.to(device)
