"""A picture file without what else is in it: EXIF data, colour profiles, comments, thumbnails, later frames.

A decoder reads these before the picture, and some can be made to take any memory or time: a directory of EXIF data may
name the same bytes thousands of times, and Pillow copies them each time.
"""

from __future__ import annotations

import struct

_MOST_JPEG_SEGMENTS = 1000
_MOST_JPEG_SCANS = 100
"""Each costs a pass over the whole picture, however short it is; progressive files have about ten."""
_MOST_PNG_CHUNKS = 100_000

_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}
"""Application segments but for JFIF's (0) and Adobe's (14, says what the colours are), and comments."""
_JPEG_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}
_START_OF_SCAN, _END_OF_IMAGE, _EXIF_SEGMENT = 0xDA, 0xD9, 0xE1
_PNG_PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_ORIENTATION_TAG = 0x0112
_SHORT, _LONG = 3, 4


def strip_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG file without its metadata, and its EXIF data.

    Raises:
        ValueError: it has more parts than a picture needs.
    """
    kept, exif, position = [data[:2]], b"", 2
    for _ in range(_MOST_JPEG_SEGMENTS):
        start = data.find(b"\xff", position)
        while data[start + 1 : start + 2] == b"\xff":
            start += 1
        if start < 0 or start + 4 > len(data):
            return b"".join([*kept, data[position:]]), exif
        marker = data[start + 1]
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            scans = data.count(b"\xff\xda", start)
            if scans > _MOST_JPEG_SCANS:
                raise ValueError(f"{scans} scans, more than {_MOST_JPEG_SCANS}")
            return b"".join([*kept, data[start:]]), exif
        position = start + 2
        if marker in _JPEG_WITHOUT_LENGTH:
            continue
        position += int.from_bytes(data[position : position + 2], "big")
        segment = data[start:position]
        if marker == _EXIF_SEGMENT and segment[4:10] == b"Exif\0\0":
            exif = exif or segment[4:]
        if marker not in _JPEG_METADATA:
            kept.append(segment)
    raise ValueError(f"more than {_MOST_JPEG_SEGMENTS} segments before the picture")


def strip_png(data: bytes) -> tuple[bytes, bytes]:
    """A PNG file without its metadata and later frames, and its EXIF data.

    Raises:
        ValueError: it has more parts than a picture needs.
    """
    kept, exif, position = [data[:8]], b"", 8
    for _ in range(_MOST_PNG_CHUNKS):
        name = data[position + 4 : position + 8]
        if len(name) < 4:
            return b"".join([*kept, data[position:]]), exif
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if name in _PNG_PICTURE:
            kept.append(data[position:end])
        elif name == b"eXIf":
            exif = exif or data[position + 8 : end - 4]
        position = end
    raise ValueError(f"more than {_MOST_PNG_CHUNKS} chunks")


def orientation(exif: bytes) -> int:
    """The orientation that EXIF data tells, 1 if none; a camera's broken data says nothing against the picture."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number, field = struct.unpack_from(f"{order}HHI4s", tiff, entry)
            if tag == _ORIENTATION_TAG:
                value: int = struct.unpack_from(order + ("H" if kind == _SHORT else "I"), field)[0]
                return value if number == 1 and kind in (_SHORT, _LONG) else 1
    except struct.error:
        pass
    return 1
