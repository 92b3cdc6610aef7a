"""ImageEncodingStage: the caller's pictures to what the transformer, or the start of the denoising, needs of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triton_diffusion.distributed.tiles import SharedTiles
from triton_diffusion.errors import StageError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import StageRequest, TickStage
from triton_diffusion.state import image_name


class ImageEncodingStage(TickStage[StageRequest]):
    """Encodes the pictures of each request of a batch, one request after the other: their sizes differ."""

    name = "image_encoding"

    def __init__(self, family: ModelFamily, components: Components) -> None:
        self._family = family
        self._components = components

    def items(self, request: StageRequest, row: int) -> StageRequest:
        """A request is one row here."""
        return request

    def verify_input(self, item: StageRequest) -> None:
        """There is a picture, and all pictures are RGB."""
        if not item.request.num_images:
            raise StageError(f"{self.name} was called for a request without pictures")
        require_images(item)

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Leave what the family makes of the pictures in the outputs."""
        for item in batch:
            item.outputs.update(self._encode(item))

    def verify_output(self, item: StageRequest) -> None:
        """All of it is finite."""
        item.require_outputs(*item.outputs)

    def _encode(self, item: StageRequest) -> dict[str, torch.Tensor]:
        def encode() -> dict[str, torch.Tensor]:
            return self._family.encode.encode_images(self._components, item.images, item.request)

        encoder = self._components["vae"].encoder
        return encoder.run(encode) if isinstance(encoder, SharedTiles) else encode()


def require_images(item: StageRequest) -> None:
    """Raise StageError unless every picture of the request is there, uint8 (H, W, 3)."""
    item.require_inputs(*(image_name(index) for index in range(item.request.num_images)))
    for image in item.images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.numel():
            raise StageError(f"a picture must be uint8 [H, W, 3], and is {image.dtype} {list(image.shape)}")
