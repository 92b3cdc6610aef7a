"""TextEncodingStage: prompts to the tensors that steer the transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import StageRequest, TickStage

NEGATIVE = "negative."
"""Prefix of the negative prompt's tensors."""


class TextEncodingStage(TickStage[StageRequest]):
    """Encodes prompt and, where guidance needs it, negative prompt; all prompts of a batch in one pass."""

    name = "text_encoding"

    def __init__(self, family: ModelFamily, components: Components) -> None:
        self._encode = family.encode
        self._components = components

    def items(self, request: StageRequest, row: int) -> StageRequest:
        """A request is one row here."""
        return request

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Leave the conditioning of every request in its outputs."""
        jobs = [(item, "", item.request.prompt) for item in batch]
        jobs += [(item, NEGATIVE, item.request.negative_prompt) for item in batch if item.request.uses_guidance]
        prompts = list(dict.fromkeys(prompt for _, _, prompt in jobs))
        max_sequence_length = batch[0].request.max_sequence_length
        encoded = self._encode.encode_prompts(self._components, prompts, max_sequence_length)
        by_prompt = dict(zip(prompts, encoded, strict=True))
        for item in batch:
            item.warnings.clear()
        for item, prefix, prompt in jobs:
            tensors: dict[str, torch.Tensor] = by_prompt[prompt].conditioning
            item.outputs.update({prefix + name: tensor for name, tensor in tensors.items()})
            if warning := by_prompt[prompt].warning:
                item.warnings.append(f"negative prompt: {warning}" if prefix else warning)

    def verify_output(self, item: StageRequest) -> None:
        """Every embedding is finite."""
        item.require_outputs(*item.outputs)
