"""TimestepPreparationStage: the noise schedule of every row."""

from __future__ import annotations

from collections.abc import Sequence

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import PipelineStage, StageRequest


class TimestepPreparationStage(PipelineStage[StageRequest]):
    """Makes one noise scheduler a row: diffusers keeps the position in the schedule inside the object."""

    name = "timestep_preparation"

    def __init__(self, family: ModelFamily, components: Components) -> None:
        self._denoise = family.denoise
        self._components = components

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Set `noise_schedulers` of every request."""
        for item in batch:
            item.noise_schedulers = [
                self._denoise.prepare_schedule(self._components, item.request) for _ in range(item.request.num_outputs)
            ]
