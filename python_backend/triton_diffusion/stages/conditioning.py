"""ConditioningStage: encoded prompts to the transformer's arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triton_diffusion.errors import StageError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import Conditioning, PipelineStage, StageRequest
from triton_diffusion.stages.text_encoding import NEGATIVE
from triton_diffusion.state import IMAGE

INITIAL = "initial_"
"""Prefix of what only the preparation of the latents sees."""


class ConditioningStage(PipelineStage[StageRequest]):
    """Puts the embeddings on the device, in the compute dtype, beside the embedded guidance scale."""

    name = "conditioning"

    def __init__(self, family: ModelFamily, components: Components) -> None:
        self._family = family
        self._components = components

    def verify_input(self, item: StageRequest) -> None:
        """The text encoding left embeddings, negative ones too where guidance needs them."""
        if not self._arguments_in(item):
            raise StageError("the state has no embeddings; call text_encoding first")
        if self._uses_guidance(item) and not any(name.startswith(NEGATIVE) for name in item.inputs):
            raise StageError(f"guidance_scale={item.request.guidance_scale} needs embeddings of the negative prompt")
        for name, tensor in self._arguments_in(item).items():
            if not tensor.ndim or tensor.shape[0] not in (1, item.request.num_outputs):
                raise StageError(
                    f"tensor {name!r} has shape {list(tensor.shape)}; it must be [1, ...], the same for all outputs, "
                    f"or [{item.request.num_outputs}, ...]"
                )

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Set `conditioning` of every request."""
        for item in batch:
            given = {name: self._on_device(tensor) for name, tensor in self._arguments_in(item).items()}
            positive = {name: tensor for name, tensor in given.items() if not name.startswith(NEGATIVE)}
            scale = item.request.embedded_guidance_scale
            positive["embedded_guidance_scale"] = torch.tensor([scale], device=self._components.device)
            negative = {name[len(NEGATIVE) :]: tensor for name, tensor in given.items() if name.startswith(NEGATIVE)}
            item.conditioning = Conditioning(positive, positive | negative if self._uses_guidance(item) else None)

    def _arguments_in(self, item: StageRequest) -> dict[str, torch.Tensor]:
        """What the encoding stages have left for the transformer."""
        others = (INITIAL, IMAGE)
        return {name: tensor for name, tensor in item.inputs.items() if not name.startswith(others)}

    def _uses_guidance(self, item: StageRequest) -> bool:
        return self._family.uses_guidance(item.request, self._components.checkpoint)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._components.device, self._components.dtype if tensor.is_floating_point() else None)
