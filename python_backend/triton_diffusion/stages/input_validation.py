"""InputValidationStage: from what the caller sent to a request in which every value is decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from triton_diffusion.config import RequestLimits
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.request import GenerationRequest, RequestDefaults, resolve_request
from triton_diffusion.stages.base import PipelineStage


@dataclass
class IncomingRequest:
    """Values by input name as they were sent, and what they were resolved to."""

    given: dict[str, Any]
    images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]] = ()
    """The pictures that came with it, (H, W, 3) each."""
    request: GenerationRequest | None = None
    warnings: list[str] = field(default_factory=list)


class InputValidationStage(PipelineStage[IncomingRequest]):
    """Runs in the chain model, before any GPU has heard of the request."""

    name = "input_validation"

    def __init__(self, family: ModelFamily, defaults: RequestDefaults, limits: RequestLimits) -> None:
        self._family = family
        self._defaults = defaults
        self._limits = limits

    def forward(self, batch: Sequence[IncomingRequest]) -> None:
        """Resolve each request; raises InvalidRequestError."""
        for item in batch:
            image_sizes = [(image.shape[0], image.shape[1]) for image in item.images]
            height, width = self._family.default_size(self._defaults, image_sizes)
            defaults = dataclasses.replace(self._defaults, height=height, width=width)
            item.request, item.warnings = resolve_request(
                item.given, defaults, self._limits, num_images=len(item.images)
            )
