"""DenoisingStage: one step of every row in the batch, each at its own place in its own schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from triton_diffusion.distributed.cfg import cfg_share, run_cfg_parallel
from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.errors import StageError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import DenoiseRow, StageParallelism, StageRequest, TickStage, require_finite


@dataclass(frozen=True)
class _Batch:
    """Some rows and the predictions they need; it stays the same until a row joins or leaves."""

    rows: tuple[DenoiseRow, ...]
    guided: list[int]
    """Positions of the rows that need an unconditional prediction; those follow behind the conditional ones."""
    own: slice
    """Which of the predictions this rank makes: all of them, unless the cfg axis has several ranks."""
    conditioning: dict[str, torch.Tensor]
    """Of its own predictions, stacked."""

    @property
    def predicted(self) -> list[DenoiseRow]:
        """The row of every prediction."""
        return [*self.rows, *(self.rows[index] for index in self.guided)]


class DenoisingStage(TickStage[DenoiseRow]):
    """The forward pass is shared; guidance, noise schedule and step number belong to the row.

    Ranks of the cfg axis make a part of the predictions each: the conditional and the unconditional one of a guided
    row, or, with several rows, as many of whatever kind; so rows without guidance keep all ranks busy, too.
    """

    name = "denoising"
    parallelism = StageParallelism.CFG_PARALLEL

    def __init__(self, family: ModelFamily, components: Components, group: RankGroup) -> None:
        self._denoise = family.denoise
        self._components = components
        self._group = group
        self.forget()

    def items(self, request: StageRequest, row: int) -> DenoiseRow:
        """One picture of the request."""
        return request.rows[row]

    def verify_input(self, item: DenoiseRow) -> None:
        """The row has a step left."""
        if item.step >= len(item.timesteps):
            raise StageError(f"row {item.key} has done all its {len(item.timesteps)} steps")

    def forward(self, batch: Sequence[DenoiseRow]) -> None:
        """Set `prediction` of every row, guidance mixed in."""
        stacked = self._stack(batch)
        predictions = run_cfg_parallel(self._group, len(stacked.predicted), lambda: self._predict(stacked))
        if predictions is None:
            return
        for index, row in enumerate(batch):
            row.prediction = predictions[index : index + 1]
        for index, row_index in enumerate(stacked.guided, len(batch)):
            row, unconditional = batch[row_index], predictions[index : index + 1]
            assert row.prediction is not None
            row.prediction = unconditional + row.guidance_scale * (row.prediction - unconditional)

    def _predict(self, batch: _Batch) -> torch.Tensor:
        """The predictions (n, S, C) of this rank; n may be 0."""
        rows = batch.predicted[batch.own]
        if not rows:
            latents = batch.rows[0].latents
            return latents.new_empty(0, *latents.shape[1:])
        return self._denoise.predict(
            self._components,
            _concatenate([row.latents for row in rows]),
            torch.stack([row.timesteps[row.step] for row in rows]),
            batch.conditioning,
            rows[0].shared,
        )

    def commit(self, batch: Sequence[DenoiseRow]) -> None:
        """Take the step: the noise scheduler of each row moves its latents on."""
        for row in batch:
            timestep = row.timesteps[row.step]
            is_last = row.step + 1 == len(row.timesteps)
            if row.preview_interval and not is_last and (row.step + 1) % row.preview_interval == 0:
                row.preview = _clean_estimate(row)
            row.latents = row.noise_scheduler.step(row.prediction, timestep, row.latents, return_dict=False)[0]
            row.prediction = None
            row.step += 1

    def forget(self) -> None:
        """Drop the rows of the last batch."""
        self._last_batch = _Batch((), [], slice(0), {})

    def collect(self, request: StageRequest) -> None:
        """Outputs: latents (num_outputs, S, C)."""
        latents = torch.cat([row.latents for row in request.rows])
        require_finite("latents", latents)
        request.outputs["latents"] = latents

    def preview(self, request: StageRequest) -> dict[str, torch.Tensor] | None:
        """The clean estimates of all rows, once each of them has a new one."""
        previews = [row.preview for row in request.rows if row.preview is not None]
        if not previews or len(previews) < len(request.rows):
            return None
        for row in request.rows:
            row.preview = None
        return {"latents": torch.cat(previews)}

    def _stack(self, batch: Sequence[DenoiseRow]) -> _Batch:
        last = self._last_batch
        # The very same rows: another request may have taken the id of one that has ended.
        if len(batch) == len(last.rows) and all(row is other for row, other in zip(batch, last.rows, strict=True)):
            return last
        guided = [index for index, row in enumerate(batch) if row.negative_conditioning is not None]
        parts = [row.conditioning for row in batch]
        parts += [negative for row in batch if (negative := row.negative_conditioning) is not None]
        own = cfg_share(self._group, len(parts))
        conditioning = {name: _concatenate([part[name] for part in parts[own]]) for name in parts[0] if parts[own]}
        self._last_batch = _Batch(tuple(batch), guided, own, conditioning)
        return self._last_batch


def _concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _clean_estimate(row: DenoiseRow) -> torch.Tensor:
    """x0 = x - sigma * v, the clean end of flow matching's straight path (Lipman et al. 2023, arXiv:2210.02747)."""
    assert row.prediction is not None
    sigma = row.noise_scheduler.sigmas[row.step]
    estimate: torch.Tensor = row.latents - sigma.to(row.latents.dtype) * row.prediction
    return estimate
