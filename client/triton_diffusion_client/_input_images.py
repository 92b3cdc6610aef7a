"""Pictures that go with a request: files, PIL pictures or encoded bytes become encoded bytes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

if TYPE_CHECKING:
    from PIL.Image import Image

InputImage: TypeAlias = "bytes | str | os.PathLike[str] | Image"
"""The content of a PNG, JPEG or WebP file, the path of one (it is read here, by the client), or a PIL picture."""

_PNG_MODES = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}


def encode_images(images: InputImage | Sequence[InputImage]) -> tuple[bytes, ...]:
    """The content of a file for each picture. Raises OSError for a file that cannot be read, TypeError for no picture.

    What a file holds is for the server to judge.
    """
    is_one = isinstance(images, bytes | bytearray | memoryview | str) or not isinstance(images, Sequence)
    return tuple(_encode(image) for image in cast(Sequence[InputImage], [images] if is_one else images))


def _encode(image: InputImage) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    # Whoever has a PIL picture has loaded PIL; nobody else must.
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(image, pil.Image):
        return _encode_png(image)
    raise TypeError(
        f"image is of type {type(image).__name__}; expected bytes of a PNG, JPEG or WebP file, a path, a PIL picture, "
        "or a list of these"
    )


def _encode_png(image: Image) -> bytes:
    buffer = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "png")
    return buffer.getvalue()
