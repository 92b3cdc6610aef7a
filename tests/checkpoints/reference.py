"""The reference: diffusers' FluxPipeline on the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline

from checkpoints.parity import distilled_arguments
from triton_diffusion.request import GenerationRequest


class Reference:
    """FluxPipeline in float32 on the CPU, asked in the words of our request."""

    def __init__(self, folder: Path, *, tiling: bool = False) -> None:
        self._pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
        if tiling:
            self._pipeline.vae.enable_tiling()
        self._pipeline.set_progress_bar_config(disable=True)

    def latents(self, request: GenerationRequest) -> torch.Tensor:
        """(num_outputs, S, C)."""
        latents: torch.Tensor = self._run(request, "latent")
        return latents

    def pictures(self, request: GenerationRequest) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 (num_outputs, H, W, 3)."""
        return np.stack([np.asarray(picture) for picture in self._run(request, "pil")])

    def _run(self, request: GenerationRequest, output_type: str) -> Any:
        return self._pipeline(
            **distilled_arguments(request),
            generator=[torch.Generator().manual_seed(seed) for seed in request.output_seeds],
            output_type=output_type,
        ).images
