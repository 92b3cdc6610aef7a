"""DenoisingStage: one step of every row in the batch, each at its own place in its own schedule."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from triton_diffusion.distributed.cfg import cfg_share, run_cfg_parallel
from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.errors import StageError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.families.schedules import clean_estimate
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import DenoiseRow, StageParallelism, StageRequest, TickStage, require_finite
from triton_diffusion.stages.row_state import RowStates, UnknownStateError, restore_rows

logger = logging.getLogger(__name__)


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
        self._family = family
        self._components = components
        self._group = group
        self.forget()

    def items(self, request: StageRequest, row: int) -> DenoiseRow:
        """One picture of the request."""
        return request.rows[row]

    def num_steps(self, request: StageRequest) -> list[int]:
        """Those of its schedule."""
        return [len(row.timesteps) for row in request.rows]

    def steps_done(self, request: StageRequest) -> list[int]:
        """The position of each row in its schedule."""
        return [row.step for row in request.rows]

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
            row.prediction = self._family.mix_guidance(row.prediction, unconditional, row.guidance_scales[row.step])

    def _predict(self, batch: _Batch) -> torch.Tensor:
        """The predictions (n, ...) of this rank; n may be 0."""
        scaled = [_model_input(row) for row in batch.rows]
        inputs = [*scaled, *(scaled[index] for index in batch.guided)][batch.own]
        rows = batch.predicted[batch.own]
        if not rows:
            return scaled[0].new_empty(0, *scaled[0].shape[1:])
        return self._family.denoise.predict(
            self._components,
            _concatenate(inputs),
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
            row.latents = row.noise_scheduler.step(
                row.prediction, timestep, row.latents, return_dict=False, **_step_arguments(row)
            )[0]
            row.prediction = None
            row.step += 1

    def forget(self) -> None:
        """Drop the rows of the last batch."""
        self._last_batch = _Batch((), [], slice(0), {})

    def checkpoint(self, request: StageRequest) -> Callable[[], bytes] | None:
        """The rows as they stand; None with a noise scheduler whose state cannot be copied."""
        try:
            return RowStates(request.rows).pack
        except UnknownStateError as error:
            logger.warning("no checkpoint of a request with %s: %s", type(request.rows[0].noise_scheduler), error)
            return None

    def resume(self, request: StageRequest, checkpoint: bytes) -> None:
        """The rows as they stood."""
        restore_rows(request.rows, checkpoint)

    def collect(self, request: StageRequest) -> None:
        """Outputs: latents (num_outputs, ...)."""
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
        return {"latents": self._family.preview_latents(torch.cat(previews), request.request)}

    def _stack_arguments(self, parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Each argument of all predictions; what differs in length is padded, with a mask beside it."""
        stacked: dict[str, torch.Tensor] = {}
        for name in parts[0]:
            tensors = [part[name] for part in parts]
            mask = self._family.padded.get(name)
            lengths = [tensor.shape[1] for tensor in tensors] if mask else []
            if mask and min(lengths) < max(lengths):
                longest = max(lengths)
                tensors = [_pad(tensor, longest) for tensor in tensors]
                positions = torch.arange(longest, device=tensors[0].device)
                stacked[mask] = positions[None] < torch.tensor(lengths, device=positions.device)[:, None]
            stacked[name] = _concatenate(tensors)
        return stacked

    def _stack(self, batch: Sequence[DenoiseRow]) -> _Batch:
        last = self._last_batch
        # The very same rows: another request may have taken the id of one that has ended.
        if len(batch) == len(last.rows) and all(row is other for row, other in zip(batch, last.rows, strict=True)):
            return last
        guided = [index for index, row in enumerate(batch) if row.negative_conditioning is not None]
        parts = [row.conditioning for row in batch]
        parts += [negative for row in batch if (negative := row.negative_conditioning) is not None]
        own = cfg_share(self._group, len(parts))
        conditioning = self._stack_arguments(parts[own]) if parts[own] else {}
        self._last_batch = _Batch(tuple(batch), guided, own, conditioning)
        return self._last_batch


def _pad(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros behind dim 1."""
    padded = tensor.new_zeros(tensor.shape[0], length, *tensor.shape[2:])
    padded[:, : tensor.shape[1]] = tensor
    return padded


def _model_input(row: DenoiseRow) -> torch.Tensor:
    """The latents as the model expects them: some noise schedulers want them divided by the noise level."""
    scale = getattr(row.noise_scheduler, "scale_model_input", None)
    if scale is None:
        return row.latents
    scaled: torch.Tensor = scale(row.latents, row.timesteps[row.step])
    return scaled.to(row.latents.dtype)


def _step_arguments(row: DenoiseRow) -> dict[str, Any]:
    """As the pipelines' prepare_extra_step_kwargs: the row's generator if noise schedulers add noise, eta 0."""
    taken = _step_parameters(row.noise_scheduler.__class__)
    return {name: value for name, value in (("generator", row.generator), ("eta", 0.0)) if name in taken}


@functools.cache
def _step_parameters(noise_scheduler: type[Any]) -> frozenset[str]:
    return frozenset(inspect.signature(noise_scheduler.step).parameters)


def _concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _clean_estimate(row: DenoiseRow) -> torch.Tensor:
    assert row.prediction is not None
    index = len(row.noise_scheduler.timesteps) - len(row.timesteps) + row.step
    return clean_estimate(row.noise_scheduler, index, row.latents, row.prediction)
