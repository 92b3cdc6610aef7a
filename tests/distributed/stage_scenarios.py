"""What the ranks of families' layout tests do: one stage, with requests as the stage before has left them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load

from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.runtime.messages import AdmitRequest, RunTick
from triton_diffusion.runtime.stage_loading import LoadedStage, load_stage
from triton_diffusion.runtime.work import rows_and_steps
from triton_diffusion.state import read_state

Results = dict[str, dict[str, NDArray[Any]]]
"""Tensors by request id and name."""


def run_stage(group: RankGroup, folder: str, stage_model: str, blobs: dict[str, bytes]) -> dict[str, Any]:
    """Run requests, those together that may; `results` are empty on all ranks but 0.

    num_weights: of the models on this rank, by component. sent_bytes: over the tensor axis.
    """
    stage = load_stage(stage_model, folder, group, dtype=torch.float32, attention_backend="torch_sdpa")
    return {
        "results": run_requests(stage, folder, stage_model, blobs),
        "num_weights": {
            name: sum(parameter.numel() for parameter in component.parameters())
            for name, component in stage.components.loaded.items()
            if isinstance(component, torch.nn.Module)
        },
        "sent_bytes": group.mesh.tp.traffic.sent_bytes,
    }


def run_in_tiles(
    group: RankGroup, folder: str, blobs: dict[str, bytes], tiles: dict[str, int], stage_model: str = "decoding"
) -> Results:
    """Decode requests, or encode their pictures, in tiles of a size that suits small pictures: arguments of the
    autoencoder's enable_tiling.
    """
    stage = load_stage(stage_model, folder, group, dtype=torch.float32, vae_tiling="on")
    stage.components["vae"].enable_tiling(**tiles)
    return run_requests(stage, folder, stage_model, blobs)


def run_requests(stage: LoadedStage, folder: str, stage_model: str, blobs: dict[str, bytes]) -> Results:
    """All requests of a batch key in one batch, as a service would run them."""
    batches: dict[str, dict[str, bytes]] = {}
    for request_id, blob in blobs.items():
        state = read_state(blob)
        key = stage.family.batch_key(stage_model, state.request, state.tensor_infos)
        batches.setdefault(key, {})[request_id] = blob
    results: Results = {}
    for batch in batches.values():
        results |= run_together(stage, folder, stage_model, batch)
    return results


def run_together(stage: LoadedStage, folder: str, stage_model: str, blobs: dict[str, bytes]) -> Results:
    """All rows of all requests in one batch, until the last is done."""
    checkpoint, left = open_checkpoint(folder), {}
    for request_id, blob in blobs.items():
        num_rows, num_steps = rows_and_steps(stage_model, stage.family, checkpoint, read_state(blob).request)
        left |= {(request_id, index): num_steps for index in range(num_rows)}
        stage.executor.admit(AdmitRequest(request_id=request_id, state=blob))
    results: Results = {}
    while left:
        done = stage.executor.run(RunTick(tick_id=0, rows=list(left), num_steps=1))
        assert not done.failed, done.failed
        left = {row: steps - 1 for row, steps in left.items() if steps > 1}
        for request_id, result in done.results.items():
            results[request_id] = {name: np.asarray(tensor.float()) for name, tensor in load(result).items()}
    return results
