"""ConditioningStage: encoded prompts to the transformer's arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triton_diffusion.errors import StageError
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import Conditioning, PipelineStage, StageRequest
from triton_diffusion.stages.text_encoding import NEGATIVE


class ConditioningStage(PipelineStage[StageRequest]):
    """Puts the embeddings on the device, in the compute dtype, beside the embedded guidance scale."""

    name = "conditioning"

    def __init__(self, components: Components) -> None:
        self._components = components

    def verify_input(self, item: StageRequest) -> None:
        """The text encoding left embeddings, negative ones too where guidance needs them."""
        if not item.inputs:
            raise StageError("the state has no embeddings; call text_encoding first")
        if item.request.uses_guidance and not any(name.startswith(NEGATIVE) for name in item.inputs):
            raise StageError(f"guidance_scale={item.request.guidance_scale} needs embeddings of the negative prompt")
        for name, tensor in item.inputs.items():
            if tensor.ndim < 2 or tensor.shape[0] != 1:
                raise StageError(f"tensor {name!r} has shape {list(tensor.shape)}; one prompt has shape [1, ...]")

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Set `conditioning` of every request."""
        for item in batch:
            positive = {name: t for name, t in item.inputs.items() if not name.startswith(NEGATIVE)}
            negative = {name[len(NEGATIVE) :]: t for name, t in item.inputs.items() if name.startswith(NEGATIVE)}
            item.conditioning = Conditioning(
                positive=self._arguments(item, positive),
                negative=self._arguments(item, negative) if item.request.uses_guidance else None,
            )

    def _arguments(self, item: StageRequest, embeddings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device, dtype = self._components.device, self._components.dtype
        arguments = {name: tensor.to(device=device, dtype=dtype) for name, tensor in embeddings.items()}
        scale = item.request.embedded_guidance_scale
        arguments["embedded_guidance_scale"] = torch.tensor([scale], device=device, dtype=torch.float32)
        return arguments
