"""Requests for the tiny checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triton_diffusion.request import GenerationRequest
from triton_diffusion.state import RequestState, write_state


def make_request(**values: Any) -> GenerationRequest:
    """A small request in which every value may be replaced."""
    defaults: dict[str, Any] = {
        "prompt": "a red circle above a blue star on a gray ground",
        "negative_prompt": "",
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "embedded_guidance_scale": 3.5,
        "seed": 7,
        "num_outputs": 1,
        "max_sequence_length": 24,
        "output_format": "raw",
        "output_quality": 90,
    }
    return GenerationRequest(**defaults | values)


def make_blob(
    request_id: str, request: GenerationRequest | None = None, images: Sequence[NDArray[np.uint8]] = ()
) -> bytes:
    """A request as it enters the first stage."""
    return write_state(RequestState(request_id, request or make_request()), images)
