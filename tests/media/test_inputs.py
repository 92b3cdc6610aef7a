"""Pictures that callers send: all that is taken, and all that is refused."""

from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin, WebPImagePlugin

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.media import decode_image

FORMATS = ["png", "jpeg", "webp"]
PICTURE = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
Y, X = np.mgrid[0:40, 0:56]
SMOOTH = np.stack([X * 4, Y * 6, 255 - X * 2 - Y], axis=-1).astype(np.uint8)


def _file(picture: NDArray[Any] | Image.Image, file_format: str = "png", **options: Any) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if file_format == "jpeg":
        options = {"quality": 95, "subsampling": 0} | options
    if file_format == "webp":
        options = {"lossless": True} | options
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _decode(data: bytes, max_pixels: int = 1 << 20, max_bytes: int = 1 << 20) -> NDArray[np.uint8]:
    return decode_image(data, name="images[0]", max_pixels=max_pixels, max_bytes=max_bytes)


def _refusal(data: bytes, **limits: int) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        _decode(data, **limits)
    message = str(refused.value)
    assert message.startswith("images[0] ")
    assert "; expected " in message
    assert len(message) < 600
    return message


def _error(picture: NDArray[np.uint8], reference: NDArray[Any]) -> float:
    assert picture.shape == reference.shape
    return float(np.abs(picture.astype(float) - reference).mean())


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, bits: int, colour_type: int, rows: bytes, more: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + more + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


# What is taken


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_picture_of_each_format(file_format: str) -> None:
    picture = _decode(_file(SMOOTH, file_format))
    assert (picture.dtype, picture.flags.c_contiguous, picture.flags.writeable) == (np.uint8, True, True)
    assert _error(picture, SMOOTH) <= (2 if file_format == "jpeg" else 0)


def test_a_lossy_webp() -> None:
    data = _file(SMOOTH, "webp", lossless=False, quality=95)
    assert data[12:16] == b"VP8 "
    assert _error(_decode(data), SMOOTH) < 4


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    "as_text",
    [
        base64.b64encode,
        base64.encodebytes,
        lambda data: b"data:image/png;base64," + base64.b64encode(data),
        lambda data: b"DATA:image/x-any.thing+1;charset=utf-8;base64,\n" + base64.b64encode(data),
        lambda data: b"  " + base64.b64encode(data).replace(b"A", b"A\r\n") + b"\n",
    ],
    ids=["plain", "lines", "data URL", "data URL with parameter", "spaces"],
)
def test_base64_text_of_a_picture(file_format: str, as_text: Callable[[bytes], bytes]) -> None:
    data = _file(PICTURE, file_format)
    np.testing.assert_array_equal(_decode(as_text(data)), _decode(data))


UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: np.rot90(stored, 1),
}
"""After the table of the EXIF standard: which side of the picture row 0 and column 0 are."""


def _exif(orientation: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", FORMATS)
def test_exif_orientation(file_format: str, orientation: int) -> None:
    picture = _decode(_file(SMOOTH, file_format, exif=_exif(orientation)))
    assert _error(picture, UPRIGHT[orientation](SMOOTH)) <= (2 if file_format == "jpeg" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_none(orientation: int) -> None:
    np.testing.assert_array_equal(_decode(_file(PICTURE, exif=_exif(orientation))), PICTURE)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF data.
def test_broken_exif_data_does_no_harm() -> None:
    for length in range(6, 28):
        exif = b"Exif\0\0" + _exif(6).tobytes().removeprefix(b"Exif\0\0")[: length - 6]
        assert _error(_decode(_file(SMOOTH, "jpeg", exif=exif)), SMOOTH) < 2
    for file_format in FORMATS:
        assert _error(_decode(_file(SMOOTH, file_format, exif=b"Exif\0\0no TIFF header")), SMOOTH) < 2


@pytest.mark.parametrize("file_format", ["png", "webp"])
def test_transparency_is_laid_on_white(file_format: str) -> None:
    alpha = np.broadcast_to(np.arange(33, dtype=np.uint8) * 7, (20, 33))
    share = alpha[..., None] / 255
    picture = _decode(
        _file(np.dstack([PICTURE, alpha]), file_format, **({"exact": True} if file_format == "webp" else {}))
    )
    assert np.abs(picture - (PICTURE * share + 255 * (1 - share))).max() <= 1


def test_transparency_of_grey_and_of_a_colour() -> None:
    grey = np.dstack([PICTURE[..., 0], np.full((20, 33), 51, dtype=np.uint8)])
    expected = np.repeat(PICTURE[..., :1] * 0.2 + 255 * 0.8, 3, axis=-1)
    assert np.abs(_decode(_file(Image.fromarray(grey, "LA"))) - expected).max() <= 1
    keyed = _png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 4, 5, 6]), _chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert _decode(keyed).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_palettes() -> None:
    palette = Image.fromarray(SMOOTH).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(_decode(_file(palette)), expected)
    with_hole = _decode(_file(palette, transparency=3))
    indices = np.asarray(palette)
    assert (with_hole[indices == 3] == 255).all()
    np.testing.assert_array_equal(with_hole[indices != 3], expected[indices != 3])


@pytest.mark.parametrize("file_format", FORMATS)
def test_grey(file_format: str) -> None:
    grey = SMOOTH[..., 0]
    assert _error(_decode(_file(grey, file_format)), np.repeat(grey[..., None], 3, axis=-1)) <= 1


def test_black_and_white_of_one_bit() -> None:
    bits = PICTURE[..., 0] > 127
    expected = np.repeat(np.where(bits, 255, 0)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(_decode(_file(Image.fromarray(bits))), expected)


def test_16_bits_are_scaled_to_8() -> None:
    """Pillow's own conversion of 16-bit grey cuts off: almost every picture would be white."""
    values = np.array([0, 128, 129, 257, 30000, 65278, 65535], dtype=">u2")
    row = b"\0" + values.tobytes()
    grey = _decode(_png(7, 1, 16, 0, row))
    assert grey[0, :, 0].tolist() == [0, 0, 1, 1, 117, 254, 255]
    assert (grey == grey[..., :1]).all()
    with_hole = _decode(_png(7, 1, 16, 0, row, _chunk(b"tRNS", struct.pack(">H", 257))))
    assert with_hole[0, :, 2].tolist() == [0, 0, 1, 255, 117, 254, 255]
    colour = _decode(_png(1, 1, 16, 2, b"\0" + np.array([0, 30000, 65535], dtype=">u2").tobytes()))
    assert np.abs(colour[0, 0].astype(int) - [0, 117, 255]).max() <= 1


def test_cmyk() -> None:
    data = _file(Image.fromarray(SMOOTH).convert("CMYK"), "jpeg")
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert _error(_decode(data), SMOOTH) < 3


@pytest.mark.parametrize("file_format", ["png", "webp"])
def test_the_first_frame_of_an_animation(file_format: str) -> None:
    later = [Image.fromarray(255 - PICTURE), Image.fromarray(PICTURE // 2)]
    data = _file(PICTURE, file_format, save_all=True, append_images=later, duration=50)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    np.testing.assert_array_equal(_decode(data), PICTURE)


def test_pillow_is_not_asked_to_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image.open tries its plugins in turn, and opens a JPEG with a second picture by another one."""
    files = [_file(PICTURE, file_format) for file_format in FORMATS]
    monkeypatch.setattr(Image, "open", _forbidden)
    for data in files:
        assert _decode(data).shape == PICTURE.shape


def _forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("this must not be called")


# Limits


@pytest.mark.parametrize("file_format", FORMATS)
def test_limits_are_inclusive(file_format: str) -> None:
    data = _file(PICTURE, file_format)
    for sent in (data, base64.b64encode(data), base64.encodebytes(data)):
        assert _decode(sent, max_pixels=20 * 33, max_bytes=len(data)).shape == PICTURE.shape
        assert "33x20 (width x height) = 660 pixels; expected at most 659" in _refusal(sent, max_pixels=659)
        message = _refusal(sent, max_bytes=len(data) - 1)
        assert f"is a file of {len(data)} bytes; expected at most {len(data) - 1}; send a smaller" in message


def test_text_that_is_too_long_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = base64.b64encode(bytes(1001))
    monkeypatch.setattr(base64, "b64decode", _forbidden)
    assert "is a file of 1001 bytes; expected at most 1000" in _refusal(text, max_bytes=1000)


def _with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def _webp(chunk: bytes, data: bytes) -> bytes:
    body = b"WEBP" + chunk + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    "png": _png(50000, 50000, 8, 2, b"\0" * 1000),
    "jpeg": _with_jpeg_size(_file(SMOOTH, "jpeg"), 50000, 50000),
    "webp, extended": _webp(b"VP8X", bytes([0x12, 0, 0, 0]) + 2 * (16383).to_bytes(3, "little")),
    "webp, lossless": _webp(b"VP8L", b"\x2f" + struct.pack("<I", 16383 << 14 | 16383) + bytes(20)),
    "webp, lossy": _webp(b"VP8 ", b"\x30\x01\x00\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + bytes(20)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_size_is_refused_before_a_pixel_is_decoded(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", _forbidden)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", _forbidden)
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "_open", _forbidden)
    side = 16384 if bomb[:4] == "webp" and bomb != "webp, lossy" else 16383 if bomb == "webp, lossy" else 50000
    assert f"has {side}x{side} (width x height) = {side * side} pixels" in _refusal(BOMBS[bomb])


@pytest.mark.parametrize("file_format", ["png", "webp", "webp, lossy"])
def test_the_size_that_is_checked_is_the_size_of_the_pixels(file_format: str) -> None:
    """The three WebP headers (the one with EXIF data is the extended one) are read by code of ours."""
    options = {"lossless": False} if file_format == "webp, lossy" else {}
    for exif in (None, _exif(1)):
        data = _file(PICTURE, file_format[:4].strip(","), **options | ({"exif": exif} if exif else {}))
        assert "has 33x20 " in _refusal(data, max_pixels=1)


@pytest.mark.parametrize("name", [b"iCCP", b"zTXt", b"iTXt"])
def test_packed_text_in_a_png_takes_no_memory(name: bytes) -> None:
    packed = zlib.compress(b"\0" * (16 << 20))
    start = {b"iCCP": b"name\0\0", b"zTXt": b"name\0\0", b"iTXt": b"name\0\1\0en\0name\0"}[name]
    data = _png(1, 1, 8, 0, b"\0\0", _chunk(name, start + packed))
    tracemalloc.start()
    try:
        assert _decode(data).tolist() == [[[0, 0, 0]]]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def _exif_that_names_the_same_bytes_again_and_again(size: int) -> bytes:
    count = (size - 14) // 12
    entries = b"".join(struct.pack("<HHII", tag, 7, size - 16, 8) for tag in range(1, count + 1))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4)


@pytest.mark.parametrize("file_format", FORMATS)
def test_exif_data_takes_no_more_memory_than_its_bytes(file_format: str) -> None:
    """Pillow would copy 64 KB for each of 5,000 entries: of a JPEG as soon as it is opened."""
    data = _file(SMOOTH, file_format, exif=_exif_that_names_the_same_bytes_again_and_again(60_000))
    tracemalloc.start()
    try:
        assert _decode(data).shape == SMOOTH.shape
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_jpeg_of_endless_scans_or_segments_and_a_png_of_endless_chunks_are_refused() -> None:
    data = _file(SMOOTH, "jpeg", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    assert "scans, more than 100" in _refusal(data[:-2] + last_scan * 100 + data[-2:])
    assert "more than 1000 segments" in _refusal(data[:2] + b"\xff\xfe\0\2" * 1000 + data[2:])
    chunks = _chunk(b"prVt", b"") * 100_000
    assert "more than 100000 chunks" in _refusal(_png(1, 1, 8, 0, b"\0\0", chunks), max_bytes=1 << 21)


# What is refused


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_truncated_file(file_format: str) -> None:
    data = _file(PICTURE, file_format)
    for length in range(16, len(data) - 40, 61):
        message = _refusal(data[:length])
        assert f"file of {length} bytes that cannot be decoded" in message
        assert message.endswith("expected a whole and undamaged file; make or send it again")
    assert "cannot be decoded" in _refusal(base64.b64encode(data[:-60]))


def test_a_damaged_file() -> None:
    data = bytearray(_file(PICTURE))
    data[len(data) // 2] ^= 0xFF
    assert "is a PNG file" in _refusal(bytes(data))
    assert "cannot be decoded" in _refusal(_png(0, 5, 8, 2, b""))
    assert "cannot be decoded" in _refusal(_webp(b"JUNK", bytes(50)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is text of 0 characters"),
        (_file(PICTURE, "gif"), "is a GIF file"),
        (_file(PICTURE, "bmp"), "is a BMP file"),
        (_file(PICTURE, "tiff"), "is a TIFF file"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF file"),
        (b"\0\0\0\x1cftypheic\0\0\0\0", "is an AVIF, HEIC or video file"),
        (bytes(range(20)), "is 20 bytes that begin with 00 01 02 03 04 05 06 07"),
        (_file(PICTURE, "ppm"), "bytes that begin with 50 36 0a"),
        (base64.b64encode(_file(PICTURE, "gif")), "is base64 text of a GIF file"),
        (b"/data/cats12", "is the path '/data/cats12';"),
        (b"a photo of a cat", "is text of 16 characters, 'a photo of a cat', that is not base64 of a picture"),
        (b"catcatcatcat", "is text of 12 characters, 'catcatcatcat', that is not base64 of a picture"),
        (b"x" * 5001, "x'..., that is not base64 of a picture"),
        (base64.b64encode(_file(PICTURE))[:-3], "that is not base64 of a picture ("),
        (base64.b64encode(_file(PICTURE)).replace(b"A", b"*"), "that is not base64 of a picture ("),
        (base64.b64encode(_file(PICTURE)).replace(b"A", b"A "), "that is not base64 of a picture ("),
        (b"https://example.com/cat.png", "is the URL 'https://example.com/cat.png'"),
        (b"file:///etc/passwd", "is the URL 'file:///etc/passwd'"),
        (b"/home/me/cat.jpeg", "is the path '/home/me/cat.jpeg'"),
        (b"cat.png", "is the path 'cat.png'"),
        (b"C:\\pictures\\cat.png", "is the path 'C:"),
        (b"../../etc/passwd", "is the path '../../etc/passwd'"),
        (b"~/cat", "is the path '~/cat'"),
        (b"data:text/plain;base64,aGFsbG8=", "is the data URL 'data:text/plain;base64,aGFsbG8=' that holds no base64"),
        (b"data:image/png,%89PNG", "is the data URL 'data:image/png,%89PNG' that holds no base64"),
        (b"data:image/png;base64,aGFsbG8=", "is the data URL 'data:image/png;base64,aGFsbG8=' that holds no"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is text of 41 characters"),
    ],
)
def test_everything_else_is_refused_by_name(data: bytes, words: str) -> None:
    message = _refusal(data)
    assert words in message
    assert "expected a PNG, JPEG or WebP file or base64 text of one" in message
    assert message.endswith("no URL and no path is opened: read the file and send its content")


def test_a_path_to_a_picture_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(_file(PICTURE))
    assert "no path is opened" in _refusal(str(path).encode())
    assert "no path is opened" in _refusal(base64.b64encode(str(path).encode()))


VALID = [_file(SMOOTH, file_format, exif=_exif(6)) for file_format in FORMATS] + [
    _file(Image.fromarray(SMOOTH).quantize(16), transparency=3),
    _file(SMOOTH, save_all=True, append_images=[Image.fromarray(255 - SMOOTH)]),
    _file(SMOOTH, "webp", save_all=True, append_images=[Image.fromarray(255 - SMOOTH)]),
    _file(SMOOTH, "webp", lossless=False),
    _file(SMOOTH, "jpeg", progressive=True),
]
STARTS = [b"", *(data[:30] for data in VALID), b"data:image/png;base64,", b"iVBORw0KGgo", b"https://"]


def _decodes_or_refuses(data: bytes) -> None:
    try:
        picture = _decode(data, max_pixels=1 << 16)
    except InvalidRequestError:
        return
    assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
    assert picture.size <= 3 << 16


@settings(max_examples=150, deadline=None)
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=300), as_text=st.booleans())
def test_random_bytes_end_in_a_refusal(start: bytes, rest: bytes, as_text: bool) -> None:
    _decodes_or_refuses(base64.b64encode(start + rest) if as_text else start + rest)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF data and the like.
@settings(max_examples=150, deadline=None)
@given(
    data=st.sampled_from(VALID),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=4),
    kept=st.floats(0, 1),
)
def test_a_changed_file_decodes_or_is_refused(data: bytes, changes: list[tuple[float, bytes]], kept: float) -> None:
    changed = bytearray(data)
    for where, new in changes:
        start = int(where**3 * len(data))  # More often in the headers.
        changed[start : start + len(new)] = new
    _decodes_or_refuses(bytes(changed[: round(len(changed) * (1 - (1 - kept) ** 3))]))
