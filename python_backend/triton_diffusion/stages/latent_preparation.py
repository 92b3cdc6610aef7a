"""LatentPreparationStage: the noise that every row starts from."""

from __future__ import annotations

from collections.abc import Sequence

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import DenoiseRow, PipelineStage, StageRequest


class LatentPreparationStage(PipelineStage[StageRequest]):
    """Draws the noise and puts together the rows of a request."""

    name = "latent_preparation"

    def __init__(self, family: ModelFamily, components: Components) -> None:
        self._denoise = family.denoise
        self._components = components

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Set `rows` of every request; conditioning and noise schedulers must be there."""
        for item in batch:
            assert item.conditioning is not None
            latents = self._denoise.prepare_latents(self._components, item.request)
            shared = self._denoise.shared_inputs(self._components, item.request)
            item.rows = [
                DenoiseRow(
                    key=f"{item.request_id}/{index}",
                    latents=latents[index : index + 1],
                    noise_scheduler=noise_scheduler,
                    timesteps=noise_scheduler.timesteps,
                    conditioning=item.conditioning.positive,
                    negative_conditioning=item.conditioning.negative,
                    shared=shared,
                    guidance_scale=item.request.guidance_scale,
                    preview_interval=item.request.preview_interval,
                )
                for index, noise_scheduler in enumerate(item.noise_schedulers)
            ]
