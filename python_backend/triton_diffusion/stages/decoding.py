"""DecodingStage: latents to pictures or videos, and those to the bytes that the caller asked for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from triton_diffusion import media
from triton_diffusion.distributed.tiles import SharedTiles
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest
from triton_diffusion.stages.base import StageRequest, TickStage

_Size = tuple[int, int, int]
"""(height, width, frames)."""
_TILED = "decoded in tiles, since it does not fit in the memory whole: edges of tiles may show"


class DecodingStage(TickStage[StageRequest]):
    """Decodes the pictures of a batch in one pass; rank 0 encodes them, so that no raw frame leaves unasked."""

    name = "decoding"

    def __init__(self, family: ModelFamily, components: Components, *, may_tile: bool = False) -> None:
        """may_tile: whether what does not fit in memory whole may be decoded in tiles, which changes it a little."""
        self._family = family
        self._decode = family.decode
        self._components = components
        self._may_tile = may_tile and hasattr(components["vae"], "use_tiling")
        self._tiled_sizes: set[_Size] = set()
        self._max_batch_tokens: int | None = None
        self._threads = ThreadPoolExecutor(thread_name_prefix="encode")

    def items(self, request: StageRequest, row: int) -> StageRequest:
        """A request is one row here."""
        return request

    def limit_batch(self, max_batch_tokens: int) -> None:
        """A request is one row, whatever its number of pictures: they may need several passes."""
        self._max_batch_tokens = max_batch_tokens

    def need_less_memory(self, item: StageRequest) -> bool:
        """Half as many pictures in a pass, and in the end one in tiles; that for all of its size from now on."""
        request = item.request
        pictures = min(request.num_outputs, self._pictures_per_pass(request) or request.num_outputs)
        if pictures > 1:
            self._max_batch_tokens = pictures // 2 * self._tokens_per_picture(request)
            return True
        if self._may_tile and _size(request) not in self._tiled_sizes:
            self._tiled_sizes.add(_size(request))
            return True
        return False

    def verify_input(self, item: StageRequest) -> None:
        """Denoising left latents."""
        item.require_inputs("latents")

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Outputs: pictures uint8 (num_outputs, H, W, 3), or videos (num_outputs, F, H, W, 3)."""
        components = self._components
        # In the type that they were made in: some autoencoders' statistics are taken back in float32.
        latents = torch.cat([item.inputs["latents"] for item in batch]).to(components.device)
        parts = latents.split(self._pictures_per_pass(batch[0].request) or len(latents))
        pictures = torch.cat([self._decode_part(part, batch[0].request) for part in parts])
        if pictures.ndim == 5 and pictures.shape[1] == 1:
            pictures = pictures[:, 0]
        start = 0
        is_tiled = _size(batch[0].request) in self._tiled_sizes
        for item in batch:
            item.warnings[:] = [_TILED] if is_tiled else []
            end = start + item.inputs["latents"].shape[0]
            item.outputs["videos" if pictures.ndim == 5 else "pictures"] = pictures[start:end]
            start = end

    def collect(self, request: StageRequest) -> None:
        """Replace pictures and videos by encoded ones, media.0, media.1, ..., unless raw ones were asked for."""
        output_format, quality = request.request.output_format, request.request.output_quality
        if output_format == "raw":
            return
        if "videos" in request.outputs:
            encode = partial(media.encode_video, output_format=output_format, fps=request.request.fps, quality=quality)
            files = self._threads.map(encode, request.outputs.pop("videos").numpy())
        else:
            encode = partial(media.encode_picture, output_format=output_format, quality=quality)
            files = self._threads.map(encode, request.outputs.pop("pictures").numpy())
        for index, data in enumerate(files):
            request.outputs[f"media.{index}"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _decode_part(self, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
        def decode() -> torch.Tensor:
            return self._decode.decode(self._components, latents, request)

        vae = self._components["vae"]
        if isinstance(vae.decoder, SharedTiles):
            return vae.decoder.run(decode)
        if _size(request) not in self._tiled_sizes:
            return decode()
        vae.enable_tiling()
        try:
            return decode()
        finally:
            vae.disable_tiling()

    def _pictures_per_pass(self, request: GenerationRequest) -> int | None:
        if self._max_batch_tokens is None:
            return None
        return max(1, self._max_batch_tokens // self._tokens_per_picture(request))

    def _tokens_per_picture(self, request: GenerationRequest) -> int:
        return self._family.num_image_tokens(request, self._components.checkpoint)


def _size(request: GenerationRequest) -> _Size:
    return request.height, request.width, request.num_frames
