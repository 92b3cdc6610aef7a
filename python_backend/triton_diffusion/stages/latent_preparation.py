"""LatentPreparationStage: the noise, or the noisy picture, that every row starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import DenoiseRow, PipelineStage, StageRequest


class LatentPreparationStage(PipelineStage[StageRequest]):
    """Draws the noise and puts together the rows of a request."""

    name = "latent_preparation"

    def __init__(self, family: ModelFamily, components: Components) -> None:
        self._family = family
        self._components = components

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Set `rows` of every request; conditioning and schedules must be there."""
        for item in batch:
            assert item.conditioning is not None
            request, inputs = item.request, item.inputs
            generators = [torch.Generator().manual_seed(seed) for seed in request.output_seeds]
            latents = self._family.denoise.prepare_latents(
                self._components, request, inputs, item.schedules[0], generators
            )
            shared = self._family.shared_inputs(self._components, request, inputs)
            negative = item.conditioning.negative
            item.rows = [
                DenoiseRow(
                    key=f"{item.request_id}/{index}",
                    latents=_first_latents(schedule.noise_scheduler, latents[index : index + 1], generator),
                    noise_scheduler=schedule.noise_scheduler,
                    timesteps=schedule.timesteps,
                    conditioning=_of_output(item.conditioning.positive, index),
                    negative_conditioning=None if negative is None else _of_output(negative, index),
                    shared=shared,
                    guidance_scales=self._family.guidance_scales(
                        request, schedule.timesteps, self._components.checkpoint
                    ),
                    preview_interval=request.preview_interval,
                    generator=generator,
                )
                for index, (schedule, generator) in enumerate(zip(item.schedules, generators, strict=True))
            ]


def _first_latents(noise_scheduler: Any, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Those of the first step: noise schedulers of our own may add noise in front of it, too."""
    begin = getattr(noise_scheduler, "begin", None)
    started: torch.Tensor = latents if begin is None else begin(latents, generator)
    return started


def _of_output(tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """The part of one output: its own, or what all outputs share."""
    return {name: t[index : index + 1] if len(t) > 1 else t for name, t in tensors.items()}
