"""Files that are no pictures, damaged ones, and small ones that want to become large."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.hostile.cases import Case, small_request, text_tensor
from benchmarks.hostile.wire import RawRequest, RawTensor

LARGEST_BYTES = 20 * 4 // 3 << 20
"""Of a request, about."""
_FORMATS = ("png", "jpeg", "webp")


def file_cases(rng: random.Random) -> Iterator[Case]:
    """Without end: each hand-made file in turn, and between them files that were good before they were damaged."""
    made, good = _hand_made(), _good()
    while True:
        for words, data in made.items():
            yield _case(rng, words, [data])
            yield _case(rng, "damaged", [_damaged(rng, good)])
        yield _case(rng, "many pictures", [good[0]] * rng.choice([0, 2, 100]))
        yield _case(rng, "a million elements", [b""] * rng.choice([10_000, 1_000_000]))


def _case(rng: random.Random, words: str, files: list[bytes]) -> Case:
    if rng.random() < 0.3:
        files = [base64.b64encode(file) for file in files]
    tensors = [*small_request().values(), text_tensor("image", *files), _strength(rng.choice([0.01, 1.0]))]
    request = RawRequest(tensors)
    if rng.random() < 0.5:
        return Case("files, gRPC", words, lambda connection: connection.infer_grpc(request))
    return Case("files, HTTP", words, lambda connection: connection.infer_http(request))


def _strength(value: float) -> RawTensor:
    return RawTensor("strength", "FP32", [1], struct.pack("<f", value))


def _good() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [_saved(picture, name, exif=exif) for name in _FORMATS]
    later = [Image.fromarray(255 - pixels)]
    made += [_saved(picture, name, save_all=True, append_images=later) for name in ("png", "webp")]
    return [*made, _saved(picture, "jpeg", progressive=True), _saved(picture.quantize(16), "png", transparency=3)]


def _saved(picture: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, name, **options)
    return buffer.getvalue()


def _damaged(rng: random.Random, good: list[bytes]) -> bytes:
    data = bytearray(rng.choice(good))
    for _ in range(rng.randint(1, 4)):
        start = int(rng.random() ** 3 * len(data))  # More often in the headers.
        data[start : start + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 4))
    return bytes(data[: rng.choice([len(data), rng.randint(0, len(data))])])


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, rows: bytes, *, bits: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")


def _webp(chunk: bytes, data: bytes) -> bytes:
    body = b"WEBP" + chunk + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _exif_bomb(size: int) -> bytes:
    """A directory of which each entry names the same bytes."""
    count = (size - 14) // 12
    entries = b"".join(struct.pack("<HHII", tag, 7, size - 16, 8) for tag in range(1, count + 1))
    return b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4)


def _hand_made() -> dict[str, bytes]:
    jpeg = _saved(Image.new("RGB", (64, 64)), "jpeg", progressive=True)
    size = jpeg.index(b"\xff\xc2") + 5
    large_jpeg = jpeg[:size] + struct.pack(">HH", 65_500, 65_500) + jpeg[size + 4 :]
    wide_jpeg = jpeg[:size] + struct.pack(">HH", 5_000, 5_000) + jpeg[size + 4 :]
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    packed = zlib.compress(bytes(32 << 20), 9)
    exif = _exif_bomb(60_000)
    return {
        "empty": b"",
        "1x100000": _png(1, 100_000, bytes(4 * 100_000)),
        "100000x1": _png(100_000, 1, bytes(1 + 3 * 100_000)),
        "5000x5000 of zeros": _png(5_000, 5_000, bytes(5_000 * 15_001)),
        "a size of 2^31": _png(2**31 - 1, 2**31 - 1, b"\0" * 100),
        "a size of 0": _png(0, 0, b""),
        "50000x50000, one bit": _png(50_000, 50_000, bytes(1000), bits=1, colour=0),
        "PNG that unpacks to more": _png(16, 16, bytes(32 << 20)),
        "packed colour profile": _png(1, 1, bytes(4), more=_chunk(b"iCCP", b"name\0\0" + packed)),
        "packed text": _png(1, 1, bytes(4), more=_chunk(b"zTXt", b"name\0\0" + packed) * 20),
        "endless chunks": _png(1, 1, bytes(4), more=_chunk(b"prVt", b"") * 200_000),
        "EXIF bomb in a PNG": _png(1, 1, bytes(4), more=_chunk(b"eXIf", exif)),
        "EXIF bomb in a JPEG": jpeg[:2]
        + b"\xff\xe1"
        + struct.pack(">H", len(exif) + 8)
        + b"Exif\0\0"
        + exif
        + jpeg[2:],
        "JPEG of 65500x65500": large_jpeg,
        "JPEG of 5000x5000, cut off": wide_jpeg,
        "endless scans": jpeg[:-2] + scan * 100_000 + jpeg[-2:],
        "endless segments": jpeg[:2] + b"\xff\xfe\0\2" * 1_000_000 + jpeg[2:],
        "WebP of 16384x16384": _webp(b"VP8X", bytes([0x12, 0, 0, 0]) + 2 * (16383).to_bytes(3, "little")),
        "WebP, lossless, of 16384x16384": _webp(b"VP8L", b"\x2f" + struct.pack("<I", 16383 << 14 | 16383) + bytes(20)),
        "WebP of nothing": _webp(b"VP8X", b""),
        "GIF": _saved(Image.new("P", (8, 8)), "gif"),
        "TIFF": _saved(Image.new("RGB", (8, 8)), "tiff"),
        "SVG with an entity": b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg xmlns="x">&a;</svg>',
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run",
        "pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
        "a path": b"/etc/passwd",
        "a URL": b"http://169.254.169.254/latest/meta-data/",
        "a data URL of nothing": b"data:image/png;base64,",
        "base64 of base64": base64.b64encode(base64.b64encode(jpeg)),
        "text of 20 MB": b"A" * (20 << 20),
    }
