"""Every family in every layout that it offers, against one rank: tiny checkpoints of the real classes, from tests/."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.layouts.parity import LAYOUTS, ONE_RANK
from benchmarks.report import Figure
from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint

_TESTS = Path(__file__).resolve().parents[3] / "tests"
_LATENT_GOAL = 1e-4
SHORT = {name: LAYOUTS[name] for name in ("tp2", "u2", "r2", "u2r2", "cfg2", "cfg2.u2")}
"""Each axis, and each way in which two meet."""
_PROMPTS = ("a red circle above a blue star", "two black cats")


def measure_families(layouts: Mapping[str, ParallelConfig] = SHORT) -> list[Figure]:
    """Largest difference of the latents of two requests at different steps, in lengths of prompts of their own."""
    if str(_TESTS) not in sys.path:
        sys.path.insert(0, str(_TESTS))
    cases = import_module("checkpoints.families").CASES
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="triton-diffusion-families-") as folder:
        for name, case in tqdm(cases.items(), desc="families"):
            checkpoint = case.build(Path(folder) / name)
            figures += _measure_family(name, checkpoint, case, layouts)
    return figures


def _measure_family(name: str, checkpoint: Path, case: Any, layouts: Mapping[str, ParallelConfig]) -> list[Figure]:
    blobs = _encode(checkpoint, case)
    expected = _denoise(checkpoint, ONE_RANK, blobs)
    figures = []
    for layout, parallel in layouts.items():
        title = f"{name}, {layout}: latents, largest difference"
        opened = open_checkpoint(str(checkpoint))
        try:
            find_family(opened).check_parallel("denoising", opened, parallel)
        except ConfigurationError as error:
            reason = (str(error).partition(": ")[2] or str(error)).partition(";")[0]
            figures.append(Figure(name=f"{title} ({reason})", value=float("nan")))
            continue
        found = _denoise(checkpoint, parallel, blobs)
        difference = max(
            float(np.abs(found[request]["latents"] - expected[request]["latents"]).max()) for request in expected
        )
        figures.append(Figure(name=title, value=difference, at_most=_LATENT_GOAL))
    return figures


def _encode(checkpoint: Path, case: Any) -> dict[str, bytes]:
    """Two requests as the denoising takes them."""
    import torch

    small = import_module("checkpoints.families").SMALL
    make_request = import_module("checkpoints.requests").make_request
    pictures = np.random.default_rng(0).integers(0, 255, (case.num_images, 64, 64, 3), dtype=np.uint8)
    stages = import_module("checkpoints.stages").InProcessStages(checkpoint)
    options = small | case.options | {"num_images": case.num_images}
    with torch.inference_mode():
        return {
            prompt: stages.encode(
                prompt,
                make_request(**options | {"prompt": prompt, "seed": index, "num_inference_steps": 3 + index}),
                list(pictures),
            )
            for index, prompt in enumerate(_PROMPTS)
        }


def _denoise(checkpoint: Path, parallel: ParallelConfig, blobs: dict[str, bytes]) -> dict[str, Any]:
    run_stage = import_module("distributed.stage_scenarios").run_stage
    answers = import_module("distributed.ranks").run_ranks(
        run_stage, parallel, folder=str(checkpoint), stage_model="denoising", blobs=blobs
    )
    results: dict[str, Any] = answers[0]["results"]
    return results
