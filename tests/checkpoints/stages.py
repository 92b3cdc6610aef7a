"""The three stage models in this process: the real plans and the real executor, without service and rank processes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load

from checkpoints.requests import make_blob
from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.errors import from_wire
from triton_diffusion.request import GenerationRequest
from triton_diffusion.runtime.messages import AdmitRequest, RunTick, TickDone
from triton_diffusion.runtime.rank_executor import RankExecutor
from triton_diffusion.runtime.stage_loading import load_stage
from triton_diffusion.runtime.work import STAGE_MODELS, rows_and_steps
from triton_diffusion.state import read_state


def alone() -> RankGroup:
    """A group of one rank on the CPU."""
    return RankGroup(rank=0, size=1, device=torch.device("cpu"))


class InProcessStages:
    """text_encoding, denoising and decoding of one checkpoint, each a RankExecutor of one rank."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self._numbers = itertools.count()
        self.executors: dict[str, RankExecutor] = {
            stage_model: load_stage(stage_model, str(folder), alone(), dtype=dtype).executor
            for stage_model in STAGE_MODELS
        }

    def admit(self, stage_model: str, request_id: str, blob: bytes) -> None:
        """Hand a state to a stage."""
        self.executors[stage_model].admit(AdmitRequest(request_id=request_id, state=blob))

    def tick(self, stage_model: str, rows: Sequence[tuple[str, int]], num_steps: int = 1) -> TickDone:
        """Run the rows together."""
        return self.executors[stage_model].run(RunTick(tick_id=0, rows=list(rows), num_steps=num_steps))

    def run(self, stage_model: str, request_id: str, blob: bytes) -> bytes:
        """One request alone through a stage; raises what the stage raised."""
        self.admit(stage_model, request_id, blob)
        num_rows, num_steps = rows_and_steps(stage_model, read_state(blob).request)
        done = self.tick(stage_model, [(request_id, index) for index in range(num_rows)], num_steps)
        if request_id in done.failed:
            raise from_wire(*done.failed[request_id])
        return done.results[request_id]

    def encode(self, request_id: str, request: GenerationRequest) -> bytes:
        """The blob that the denoising stage takes."""
        return self.run("text_encoding", request_id, make_blob(request_id, request))

    def latents(self, request: GenerationRequest, request_id: str | None = None) -> torch.Tensor:
        """(num_outputs, S, C) of a request that runs alone, by default under an id that was never used."""
        request_id = request_id or f"request-{next(self._numbers)}"
        return load(self.run("denoising", request_id, self.encode(request_id, request)))["latents"]

    def pictures(self, request: GenerationRequest) -> torch.Tensor:
        """uint8 (num_outputs, H, W, 3) of a request that runs alone and asks for raw pictures."""
        request_id = f"request-{next(self._numbers)}"
        denoised = self.run("denoising", request_id, self.encode(request_id, request))
        return load(self.run("decoding", request_id, denoised))["pictures"]
