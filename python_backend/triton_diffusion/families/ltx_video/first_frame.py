"""The noise on a first frame that is given, as diffusers' LTXConditionPipeline adds it in every step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

# image_cond_noise_scale of the pipeline: a still picture with a little noise lets the video move.
NOISE_SCALE = 0.15


class FlowMatchEulerFirstFrameScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's steps; between them the first frame, which they leave alone, gets new noise in proportion to sigma^2.

    The last noise stays on it, as in the pipeline. Rows are latents (1, C, F, h, w).
    """

    def begin(self, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Latents whose first frame is clean, with the noise of the first step."""
        self._clean = latents[:, :, :1].clone()
        return self._renewed(latents, generator, 0)

    def step(
        self, model_output: Any, timestep: Any, sample: Any, *args: Any, generator: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor]:
        """(the latents of the next step,); `generator` is the row's, and nothing is drawn behind the last step."""
        latents = super().step(model_output, timestep, sample, *args, **kwargs | {"return_dict": False})[0]
        is_last = self.step_index == len(self.timesteps)
        return (latents if is_last else self._renewed(latents, generator, self.step_index),)

    def _renewed(self, latents: torch.Tensor, generator: torch.Generator, index: int) -> torch.Tensor:
        batch, channels, frames, height, width = latents.shape
        # The pipeline draws for all its tokens, of which those of the first frame come first, channels innermost.
        noise = torch.randn(batch, frames * height * width, channels, generator=generator)[:, : height * width]
        noise = noise.transpose(1, 2).reshape(self._clean.shape).to(latents)
        renewed = latents.clone()
        renewed[:, :, :1] = self._clean + NOISE_SCALE * noise * self.sigmas[index] ** 2
        return renewed
