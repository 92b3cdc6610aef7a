"""Our stages and the LTX pipelines, whose latents are packed where ours are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from checkpoints import requests
from checkpoints.parity import Pair
from checkpoints.stages import Picture
from triton_diffusion.request import GenerationRequest


def make_request(**values: Any) -> GenerationRequest:
    """A video of five frames in three steps."""
    return requests.make_request(**{"num_frames": 5, "num_inference_steps": 3, "fps": 25.0} | values)


class LtxPair(Pair):
    """Latents as videos: (B, C, F, h, w)."""

    def reference(self, request: GenerationRequest, images: Sequence[Picture] = (), output_type: str = "latent") -> Any:
        result = super().reference(request, images, output_type)
        if output_type != "latent" or result.ndim == 5:
            return result
        size = ((request.num_frames - 1) // 2 + 1, request.height // 8, request.width // 8)
        return result.transpose(1, 2).unflatten(2, size)
