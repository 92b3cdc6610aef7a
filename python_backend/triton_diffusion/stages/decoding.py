"""DecodingStage: latents to pictures, and pictures to the bytes that the caller asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.media import encode_picture
from triton_diffusion.stages.base import StageRequest, TickStage


class DecodingStage(TickStage[StageRequest]):
    """Decodes the pictures of a batch in one pass; rank 0 encodes them, so that no raw frame leaves unasked."""

    name = "decoding"

    def __init__(self, family: ModelFamily, components: Components) -> None:
        self._decode = family.decode
        self._components = components

    def items(self, request: StageRequest, row: int) -> StageRequest:
        """A request is one row here."""
        return request

    def verify_input(self, item: StageRequest) -> None:
        """Denoising left latents."""
        item.require_inputs("latents")

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Outputs: pictures uint8 (num_outputs, H, W, 3)."""
        components = self._components
        latents = torch.cat([item.inputs["latents"] for item in batch]).to(components.device, components.dtype)
        pictures = self._decode.decode(components, latents, batch[0].request)
        start = 0
        for item in batch:
            end = start + item.inputs["latents"].shape[0]
            item.outputs["pictures"] = pictures[start:end]
            start = end

    def collect(self, request: StageRequest) -> None:
        """Replace the pictures by encoded ones, media.0, media.1, ..., unless raw ones were asked for."""
        if request.request.output_format == "raw":
            return
        for index, picture in enumerate(request.outputs.pop("pictures")):
            data = encode_picture(picture.numpy(), request.request.output_format, request.request.output_quality)
            request.outputs[f"media.{index}"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
