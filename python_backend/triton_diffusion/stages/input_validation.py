"""InputValidationStage: from what the caller sent to a request in which every value is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from triton_diffusion.config import ChainConfig
from triton_diffusion.request import GenerationRequest, RequestDefaults, resolve_request
from triton_diffusion.stages.base import PipelineStage


@dataclass
class IncomingRequest:
    """Values by input name as they were sent, and what they were resolved to."""

    given: dict[str, Any]
    request: GenerationRequest | None = None
    warnings: list[str] = field(default_factory=list)


class InputValidationStage(PipelineStage[IncomingRequest]):
    """Runs in the chain model, before any GPU has heard of the request."""

    name = "input_validation"

    def __init__(self, defaults: RequestDefaults, limits: ChainConfig) -> None:
        self._defaults = defaults
        self._limits = limits

    def forward(self, batch: Sequence[IncomingRequest]) -> None:
        """Resolve each request; raises InvalidRequestError."""
        for item in batch:
            item.request, item.warnings = resolve_request(item.given, self._defaults, self._limits)
