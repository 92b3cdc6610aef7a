"""TimestepPreparationStage: the noise schedule of every row."""

from __future__ import annotations

from collections.abc import Sequence

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import PipelineStage, StageRequest


class TimestepPreparationStage(PipelineStage[StageRequest]):
    """Makes one noise scheduler a row: diffusers keeps the position in the schedule inside the object."""

    name = "timestep_preparation"

    def __init__(self, family: ModelFamily, components: Components) -> None:
        self._family = family
        self._components = components

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Set `schedules` of every request."""
        prepare = self._family.denoise.prepare_schedule
        for item in batch:
            item.schedules = [prepare(self._components, item.request) for _ in range(item.request.num_outputs)]

    def verify_output(self, item: StageRequest) -> None:
        """There are as many timesteps as the scheduler of requests counts on."""
        expected = self._family.num_steps(item.request, self._components.checkpoint)
        for schedule in item.schedules:
            if len(schedule.timesteps) != expected:
                raise InvalidRequestError(
                    f"{type(schedule.noise_scheduler).__name__} makes {len(schedule.timesteps)} timesteps of "
                    f"num_inference_steps={item.request.num_inference_steps}, not {expected}; try another number"
                )
