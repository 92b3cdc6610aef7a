"""A picture that a caller sent, to pixels: nothing in it is trusted, and nothing that it names is opened."""

from __future__ import annotations

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.media._base64_text import EXPECTED, check_file_bytes, describe_text, file_of_text, is_text
from triton_diffusion.media._containers import orientation, strip_jpeg, strip_png

_NAMES: dict[type[ImageFile], str] = {PngImageFile: "PNG", JpegImageFile: "JPEG", WebPImageFile: "WebP"}
"""The Pillow plugins that may run."""

_OTHER_FILES = {
    b"GIF8": "a GIF file",
    b"BM": "a BMP file",
    b"II*\0": "a TIFF file",
    b"MM\0*": "a TIFF file",
    b"%PDF": "a PDF file",
}
"""By first bytes, what callers are likely to send instead."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, what turns the stored picture upright; 1 is upright already."""


def decode_image(data: bytes, *, name: str, max_pixels: int, max_bytes: int) -> NDArray[np.uint8]:
    """A PNG, JPEG or WebP file, or base64 text of one (also as a data URL), as uint8 (H, W, 3) in RGB.

    What the file is, its content says. Its size is read from its header and checked before a pixel is decoded; what
    else is in the file is dropped before a decoder sees it. The picture is turned upright by its EXIF orientation. Of
    an animation the first frame is taken; transparency is laid on white; grey, palette and CMYK become RGB, 16 bits
    become 8; a colour profile is not applied.

    Args:
        data: The bytes that the caller sent.
        name: Of the input, for messages.
        max_pixels: Height times width, at most.
        max_bytes: Of the file, at most; base64 text of it is a third longer.

    Raises:
        InvalidRequestError: it is something else, damaged, or too large; a URL or a path is never opened.
    """
    kind, file = _file_kind(data), data
    if kind is None and is_text(data):
        file = file_of_text(data, name, max_bytes)
        kind = _file_kind(file)
    check_file_bytes(len(file), name, max_bytes)
    if kind is None:
        raise InvalidRequestError(f"{name} is {_description(data, file)}; {EXPECTED}")
    try:
        picture = _decode(kind, file, name, max_pixels)
    except InvalidRequestError:
        raise
    except Exception as error:  # A damaged file provokes many kinds of exceptions in a decoder.
        raise InvalidRequestError(
            f"{name} is a {_NAMES[kind]} file of {len(file)} bytes that cannot be decoded "
            f"({type(error).__name__}: {error}); expected a whole and undamaged file; make or send it again"
        ) from error
    return np.array(picture)


def _file_kind(data: bytes) -> type[ImageFile] | None:
    """The plugin that is to read this; Image.open would let the file choose among all of Pillow's."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    return None


def _description(data: bytes, file: bytes) -> str:
    """What was sent; `file` is what it holds if it is base64 text, else the same."""
    words = "an AVIF, HEIC or video file" if file[4:8] == b"ftyp" else ""
    for start, others in _OTHER_FILES.items():
        if file.startswith(start):
            words = others
    if is_text(data):
        return f"base64 text of {words}" if words else describe_text(data)
    return words or (f"{len(data)} bytes that begin with {data[:8].hex(' ')}" if data else "empty")


def _decode(kind: type[ImageFile], data: bytes, name: str, max_pixels: int) -> Image.Image:
    if kind is WebPImageFile:
        # Pillow's WebP decoder takes memory for the whole canvas when it is made, before it says its size.
        _check_pixels(_webp_size(data), name, max_pixels)
    exif = b""
    if kind is not WebPImageFile:
        data, exif = (strip_jpeg if kind is JpegImageFile else strip_png)(data)
    with kind(io.BytesIO(data)) as image:
        _check_pixels(image.size, name, max_pixels)
        image.load()
        upright = _UPRIGHT.get(orientation(exif or image.info.get("exif", b"")))
        picture = _to_rgb(image)
    return picture if upright is None else picture.transpose(upright)


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InvalidRequestError(
            f"{name} has {width}x{height} (width x height) = {width * height} pixels; expected at most {max_pixels}; "
            "send a smaller picture"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from the first chunk (https://developers.google.com/speed/webp/docs/riff_container)."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, width_high, height, height_high = struct.unpack_from("<HBHB", data, 24)
        return 1 + width + (width_high << 16), 1 + height + (height_high << 16)
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError(f"first chunk {chunk!r}")


def _to_rgb(image: ImageFile) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    picture = Image.new("RGB", image.size, "white")
    picture.paste(with_alpha, mask=with_alpha)
    return picture


def _from_16_bits(image: ImageFile) -> Image.Image:
    """Grey of 16 bits scaled to 8; Pillow's own conversion cuts off all above 255."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")
