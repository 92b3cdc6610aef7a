"""Stable Diffusion over two ranks, which make one of the two predictions of guidance each, against one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.stable_diffusion import (
    build_stable_diffusion_checkpoint,
    build_stable_diffusion_xl_checkpoint,
    make_short_request,
)
from checkpoints.stages import InProcessStages
from distributed.ranks import run_ranks
from distributed.stage_scenarios import run_stage
from triton_diffusion.config import ParallelConfig

REQUESTS = {
    "plain": make_short_request(prompt="x"),
    "guided": make_short_request(num_inference_steps=3, guidance_scale=3.0, num_outputs=2),
}


@pytest.mark.parametrize("build", [build_stable_diffusion_checkpoint, build_stable_diffusion_xl_checkpoint])
def test_two_ranks_share_the_predictions_of_guidance(build: Any, tmp_path: Path) -> None:
    folder = build(tmp_path / "checkpoint")
    stages = InProcessStages(folder)
    blobs = {request_id: stages.encode(request_id, request) for request_id, request in REQUESTS.items()}
    arguments: dict[str, Any] = {"folder": str(folder), "stage_model": "denoising", "blobs": blobs}
    (alone,) = run_ranks(run_stage, ParallelConfig(), **arguments)
    answer, _ = run_ranks(run_stage, ParallelConfig(cfg=2), **arguments)
    for request_id, expected in alone["results"].items():
        error = np.abs(answer["results"][request_id]["latents"] - expected["latents"]).max()
        print(f"{request_id}: largest error {error:.2e} of {np.abs(expected['latents']).max():.2f}")
        assert error < 1e-4
