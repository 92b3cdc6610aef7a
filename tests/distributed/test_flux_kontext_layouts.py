"""FLUX Kontext over several ranks: the tokens of the picture beside are divided with those that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.flux import build_flux_checkpoint
from checkpoints.requests import make_request
from checkpoints.stages import InProcessStages
from distributed.ranks import run_ranks
from distributed.stage_scenarios import run_stage
from triton_diffusion.config import ParallelConfig
from triton_diffusion.families.flux import kontext

SIZE: dict[str, Any] = {"height": 20, "width": 28, "max_sequence_length": 25, "num_images": 1}
"""35 tokens that are drawn, 54 of the picture beside, and 25 of the prompt."""
REQUESTS = {
    "plain": make_request(**SIZE, num_inference_steps=2),
    "guided": make_request(**SIZE, num_inference_steps=3, guidance_scale=3.0, num_outputs=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("kontext-layouts")
    build_flux_checkpoint(path, guidance_embeds=True, dynamic_shift=True, pipeline_class="FluxKontextPipeline")
    return str(path)


@pytest.fixture(scope="module")
def blobs(folder: str) -> dict[str, bytes]:
    stages, picture = InProcessStages(Path(folder)), np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kontext, "PREFERRED_SIZES", ((24, 36),))
        return {request_id: stages.encode(request_id, request, [picture]) for request_id, request in REQUESTS.items()}


@pytest.fixture(scope="module")
def alone(folder: str, blobs: dict[str, bytes]) -> dict[str, Any]:
    (answer,) = run_ranks(run_stage, ParallelConfig(), folder=folder, stage_model="denoising", blobs=blobs)
    return dict(answer)


@pytest.mark.parametrize("parallel", [ParallelConfig(ulysses=2), ParallelConfig(ring=3), ParallelConfig(tp=2)], ids=str)
def test_every_layout_draws_what_one_rank_does(
    folder: str, blobs: dict[str, bytes], alone: dict[str, Any], parallel: ParallelConfig
) -> None:
    answers = run_ranks(run_stage, parallel, folder=folder, stage_model="denoising", blobs=blobs)
    for request_id, expected in alone["results"].items():
        assert expected["latents"].shape[1] == 35
        error = np.abs(answers[0]["results"][request_id]["latents"] - expected["latents"]).max()
        print(f"{request_id}: largest error {error:.2e} of {np.abs(expected['latents']).max():.2f}")
        assert error < 1e-5
