"""The stage models in this process: the real plans and the real executor, without service and rank processes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load

from checkpoints.requests import make_blob
from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.errors import from_wire
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.request import GenerationRequest
from triton_diffusion.runtime.messages import AdmitRequest, RunTick, TickDone
from triton_diffusion.runtime.rank_executor import RankExecutor
from triton_diffusion.runtime.stage_loading import load_stage
from triton_diffusion.runtime.work import STAGE_MODELS, rows_and_steps
from triton_diffusion.state import IMAGE, merge_tensors, read_state

Picture = NDArray[np.uint8]


def alone() -> RankGroup:
    """A group of one rank on the CPU."""
    return RankGroup(rank=0, size=1, device=torch.device("cpu"))


class InProcessStages:
    """All stage models of one checkpoint, each a RankExecutor of one rank."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        checkpoint_steps: int = 0,
        *,
        pack_linears: bool = True,
    ) -> None:
        self._numbers = itertools.count()
        self.checkpoint = open_checkpoint(str(folder))
        self.family = find_family(self.checkpoint)
        needed = self.family.stage_components(self.checkpoint)
        self.executors: dict[str, RankExecutor] = {
            stage_model: load_stage(
                stage_model,
                str(folder),
                alone(),
                dtype=dtype,
                checkpoint_steps=checkpoint_steps,
                pack_linears=pack_linears,
            ).executor
            for stage_model in STAGE_MODELS
            if stage_model in needed
        }

    def admit(self, stage_model: str, request_id: str, blob: bytes, checkpoint: bytes | None = None) -> None:
        """Hand a state to a stage."""
        self.executors[stage_model].admit(AdmitRequest(request_id=request_id, state=blob, checkpoint=checkpoint))

    def tick(self, stage_model: str, rows: Sequence[tuple[str, int]], num_steps: int = 1) -> TickDone:
        """Run the rows together."""
        return self.executors[stage_model].run(RunTick(tick_id=0, rows=list(rows), num_steps=num_steps))

    def run(self, stage_model: str, request_id: str, blob: bytes) -> bytes:
        """One request alone through a stage; raises what the stage raised."""
        self.admit(stage_model, request_id, blob)
        num_rows, num_steps = rows_and_steps(stage_model, self.family, self.checkpoint, read_state(blob).request)
        done = self.tick(stage_model, [(request_id, index) for index in range(num_rows)], num_steps)
        if request_id in done.failed:
            raise from_wire(*done.failed[request_id])
        return done.results[request_id]

    def encode(self, request_id: str, request: GenerationRequest, images: Sequence[Picture] = ()) -> bytes:
        """The blob that the denoising stage takes: what all stages before it have left."""
        blob = make_blob(request_id, request, images)
        for stage_model in self.family.encoders(request):
            last = stage_model == self.family.encoders(request)[-1]
            blob = merge_tensors(blob, self.run(stage_model, request_id, blob), drop=IMAGE if last else "")
        return blob

    def latents(
        self, request: GenerationRequest, request_id: str | None = None, images: Sequence[Picture] = ()
    ) -> torch.Tensor:
        """(num_outputs, ...) of a request that runs alone, by default under an id that was never used."""
        request_id = request_id or f"request-{next(self._numbers)}"
        return load(self.run("denoising", request_id, self.encode(request_id, request, images)))["latents"]

    def pictures(self, request: GenerationRequest, images: Sequence[Picture] = ()) -> torch.Tensor:
        """uint8 (num_outputs, H, W, 3), or of videos (num_outputs, F, H, W, 3), of a request that runs alone and asks
        for raw ones.
        """
        request_id = f"request-{next(self._numbers)}"
        denoised = self.run("denoising", request_id, self.encode(request_id, request, images))
        decoded = load(self.run("decoding", request_id, denoised))
        return decoded["videos"] if "videos" in decoded else decoded["pictures"]

    def run_batched(
        self,
        requests: Mapping[str, GenerationRequest],
        joins: Mapping[str, int],
        images: Mapping[str, Sequence[Picture]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Latents of requests that are denoised together, each joining at its own tick and leaving when it is done."""
        left: dict[str, int] = {}
        results: dict[str, torch.Tensor] = {}
        tick = 0
        while len(results) < len(requests):
            for request_id, request in requests.items():
                if joins[request_id] == tick:
                    blob = self.encode(request_id, request, (images or {}).get(request_id, ()))
                    self.admit("denoising", request_id, blob)
                    left[request_id] = rows_and_steps("denoising", self.family, self.checkpoint, request)[1]
            rows = [(request_id, index) for request_id in left for index in range(requests[request_id].num_outputs)]
            done = self.tick("denoising", rows)
            assert not done.failed, done.failed
            left = {request_id: steps - 1 for request_id, steps in left.items() if steps > 1}
            assert set(done.results).isdisjoint(left)
            results |= {request_id: load(blob)["latents"] for request_id, blob in done.results.items()}
            tick += 1
        return results
