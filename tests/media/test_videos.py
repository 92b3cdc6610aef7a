"""Videos to bytes, each decoded again by PyAV or Pillow."""

from __future__ import annotations

import base64
import contextlib
import io
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from triton_diffusion.media import encode_video
from triton_diffusion.request import VIDEO_FORMATS

HEIGHT, WIDTH, NUM_FRAMES = 66, 98, 13
FILM_FORMATS = ["mp4", "webm"]
FILE_FORMATS = [*FILM_FORMATS, "gif"]


def _waves(num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH) -> Iterator[NDArray[np.uint8]]:
    y, x = np.mgrid[0:height, 0:width]
    for index in range(num_frames):
        red = 127 + 120 * np.sin(x / 20 + index / 4)
        green = 127 + 120 * np.cos(y / 15 - index / 5)
        yield np.stack([red, green, np.full_like(red, 40 + index)], axis=-1).astype(np.uint8)


def _of_one_colour(*colours: tuple[int, int, int]) -> list[NDArray[np.uint8]]:
    return [np.full((HEIGHT, WIDTH, 3), colour, dtype=np.uint8) for colour in colours]


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    frames: list[NDArray[np.uint8]]
    starts_s: list[float]
    duration_s: float
    frame_rate: Fraction | None
    codec: str
    pixel_format: str | None
    colours: set[int]
    colour_range: int


def _decode(data: bytes) -> _Decoded:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames, starts_s = [], []
        for frame in container.decode(stream):
            frames.append(frame.to_ndarray(format="rgb24"))
            starts_s.append(frame.time)
        context = stream.codec_context
        return _Decoded(
            frames=frames,
            starts_s=starts_s,
            duration_s=container.duration / 1e6,
            frame_rate=stream.average_rate,
            codec=context.name,
            pixel_format=context.pix_fmt,
            colours={context.colorspace, context.color_primaries, context.color_trc},
            colour_range=context.color_range,
        )


def _worst_psnr(frames: Sequence[NDArray[np.uint8]], references: Sequence[NDArray[np.uint8]]) -> float:
    return min(_psnr(*pair) for pair in zip(frames, references, strict=True))


def _psnr(frame: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((frame.astype(float) - reference) ** 2))))


@pytest.mark.parametrize("output_format", FILE_FORMATS)
def test_a_video_shows_the_frames_in_their_order(output_format: str) -> None:
    given = list(_waves())
    seen = _decode(encode_video(iter(given), output_format, 24, 90)).frames
    assert [frame.shape for frame in seen] == [(HEIGHT, WIDTH, 3)] * NUM_FRAMES
    for index, frame in enumerate(seen):
        assert _psnr(frame, given[index]) > 34
        assert np.argmax([_psnr(frame, other) for other in given]) == index


@pytest.mark.parametrize("name", [name for name in VIDEO_FORMATS if name.startswith("b64_")])
def test_a_b64_format_is_the_same_video_as_base64_text(name: str) -> None:
    file = base64.b64decode(encode_video(_waves(3), name, 24, 90), validate=True)
    assert _worst_psnr(_decode(file).frames, _decode(encode_video(_waves(3), name[4:], 24, 90)).frames) > 40


def test_mp4_is_h264_and_webm_is_vp9_in_yuv420p() -> None:
    mp4, webm = (encode_video(_waves(3), output_format, 24, 90) for output_format in FILM_FORMATS)
    assert (_decode(mp4).codec, _decode(mp4).pixel_format) == ("h264", "yuv420p")
    assert (_decode(webm).codec, _decode(webm).pixel_format) == ("vp9", "yuv420p")
    assert mp4[4:8] == b"ftyp"
    assert b"webm" in webm[:64]


@pytest.mark.parametrize("output_format", FILE_FORMATS)
def test_the_same_frames_make_the_same_video(output_format: str) -> None:
    """Not to the bit: x264 decides otherwise now and then, with one thread too."""
    one, other = (_decode(encode_video(_waves(), output_format, 24, 90)).frames for _ in range(2))
    assert _worst_psnr(one, other) > 40


def test_the_best_quality_is_still_a_profile_that_browsers_play() -> None:
    """CRF 0 would be lossless H.264 in a profile of its own."""
    with av.open(io.BytesIO(encode_video(_waves(3), "mp4", 24, 100))) as container:
        assert container.streams.video[0].profile == "High"


@pytest.mark.parametrize("output_format", FILM_FORMATS)
def test_saturated_colours_come_back_and_are_declared(output_format: str) -> None:
    """The wrong matrix, BT.601 for BT.709, would turn (220, 30, 30) into another red."""
    colours = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (235, 235, 30), (0, 0, 0), (255, 255, 255)]
    seen = _decode(encode_video(_of_one_colour(*colours), output_format, 24, 90))
    assert (seen.colours, seen.colour_range) == ({1}, 1)
    for frame, colour in zip(seen.frames, colours, strict=True):
        assert np.abs(frame.mean(axis=(0, 1)) - colour).max() < 4


def _boxes(mp4: bytes) -> list[bytes]:
    names, start = [], 0
    while start < len(mp4):
        names.append(mp4[start + 4 : start + 8])
        start += int.from_bytes(mp4[start : start + 4], "big")
    return names


def test_an_mp4_plays_while_it_loads() -> None:
    data = encode_video(_waves(60), "mp4", 24, 90)
    assert [name for name in _boxes(data) if name in {b"moov", b"mdat"}] == [b"moov", b"mdat"]
    given = list(_waves(60))
    seen = list(_frames_of_a_part(data[: len(data) * 2 // 3]))
    assert 20 < len(seen) < 60
    assert min(_psnr(*pair) for pair in zip(seen, given, strict=False)) > 34


def _frames_of_a_part(data: bytes) -> Iterator[NDArray[np.uint8]]:
    with av.open(io.BytesIO(data)) as container, contextlib.suppress(av.error.InvalidDataError):
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


@pytest.mark.parametrize(("height", "width"), [(65, 98), (66, 97), (65, 97), (1, 1)])
@pytest.mark.parametrize("output_format", FILE_FORMATS)
def test_odd_sizes(output_format: str, height: int, width: int) -> None:
    given = list(_waves(3, height, width))
    seen = _decode(encode_video(given, output_format, 24, 90)).frames
    even = output_format == "mp4"
    assert seen[0].shape == (height + even * height % 2, width + even * width % 2, 3)
    for frame, reference in zip(seen, given, strict=True):
        assert _psnr(frame[:height, :width], reference) > 30
        assert np.abs(frame[-1].astype(int) - frame[height - 1]).mean() < 4
        assert np.abs(frame[:, -1].astype(int) - frame[:, width - 1]).mean() < 4


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (24, Fraction(24)),
        (16.0, Fraction(16)),
        (23.976, Fraction(24000, 1001)),
        (float(np.float32(23.976)), Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (12.5, Fraction(25, 2)),
        (0.1, Fraction(1, 10)),
        (240, Fraction(240)),
    ],
)
@pytest.mark.parametrize("output_format", FILM_FORMATS)
def test_frames_a_second_are_a_fraction(output_format: str, fps: float, exact: Fraction) -> None:
    seen = _decode(encode_video(_waves(7, 16, 16), output_format, fps, 50))
    assert seen.frame_rate == exact
    assert seen.starts_s == pytest.approx([float(index / exact) for index in range(7)], abs=0.001)
    assert seen.duration_s == pytest.approx(float(7 / exact), abs=0.0011)


@pytest.mark.parametrize("output_format", FILM_FORMATS)
def test_quality_trades_bytes_for_errors(output_format: str) -> None:
    given = list(_waves())
    files = [encode_video(given, output_format, 24, quality) for quality in (1, 25, 50, 75, 100)]
    errors = [np.mean([_psnr(*pair) for pair in zip(_decode(file).frames, given, strict=True)]) for file in files]
    assert sorted(files, key=len) == files
    assert sorted(errors) == errors
    assert errors[-1] - errors[0] > 6


def _gif_frames(data: bytes) -> list[tuple[NDArray[np.uint8], int]]:
    """Each frame and the milliseconds for which it is shown."""
    frames = []
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.info["loop"]) == ("GIF", 0)
        for index in range(image.n_frames):
            image.seek(index)
            frames.append((np.asarray(image.convert("RGB")), image.info["duration"]))
    return frames


@pytest.mark.parametrize("fps", [8, 24, 23.976, 30, 50])
def test_a_gif_keeps_its_speed_in_hundredths_of_a_second(fps: float) -> None:
    shown_ms = [duration for _, duration in _gif_frames(encode_video(_waves(25, 16, 16), "gif", fps, 90))]
    assert len(shown_ms) == 25
    assert np.cumsum(shown_ms) == pytest.approx([1000 * (index + 1) / fps for index in range(25)], abs=10)


def test_a_gif_of_more_than_50_frames_a_second_leaves_frames_out() -> None:
    given = list(_waves(61, 32, 32))
    frames = _gif_frames(encode_video(given, "gif", 60, 90))
    assert all(duration >= 20 for _, duration in frames)
    assert sum(duration for _, duration in frames) == pytest.approx(1000, abs=35)
    assert len(frames) > 40
    assert _psnr(frames[-1][0], given[-1]) > 30


def test_a_gif_chooses_its_colours_for_each_frame() -> None:
    shades = np.tile(np.linspace(0, 255, 256, dtype=np.uint8), (64, 1))
    given = [np.zeros((64, 256, 3), dtype=np.uint8) for _ in range(3)]
    for channel, frame in enumerate(given):
        frame[..., channel] = shades
    for (frame, _), reference in zip(_gif_frames(encode_video(given, "gif", 10, 90)), given, strict=True):
        assert np.abs(frame.astype(int) - reference).mean() < 3


def test_a_gif_shows_gradients_without_bands() -> None:
    """What the eye averages, here 4 x 4 pixels, is within 51 dB; the same colours without dithering miss by 46."""
    given = list(_waves(3, 128, 256))
    for (frame, _), reference in zip(_gif_frames(encode_video(given, "gif", 10, 90)), given, strict=True):
        assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 200
        averages, references = (each.reshape(32, 4, 64, 4, 3).mean(axis=(1, 3)) for each in (frame, reference))
        assert _psnr(averages, references) > 49


@pytest.mark.parametrize("output_format", FILE_FORMATS)
def test_frames_are_taken_and_let_go_one_by_one(output_format: str) -> None:
    alive: weakref.WeakSet[_Frame] = weakref.WeakSet()
    most_alive = 0

    def frames() -> Iterator[NDArray[np.uint8]]:
        nonlocal most_alive
        for frame in _waves(40, 64, 64):
            tracked = frame.view(_Frame)
            alive.add(tracked)
            del frame
            most_alive = max(most_alive, len(alive))
            yield tracked
            del tracked

    encode_video(frames(), output_format, 24, 50)
    assert most_alive <= 2


class _Frame(np.ndarray):  # type: ignore[type-arg]
    """An array that a weak set takes."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # type: ignore[assignment]


def test_memory_does_not_grow_with_the_length() -> None:
    frames = (np.full((256, 256, 3), index, dtype=np.uint8) for index in range(80))
    tracemalloc.start()
    try:
        data = encode_video(frames, "mp4", 24, 50)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5 * 256 * 256 * 3 + 4 * len(data)


def test_a_frame_may_be_a_view() -> None:
    channels_first = [np.ascontiguousarray(frame.transpose(2, 0, 1)) for frame in _waves(3)]
    views = [frame.transpose(1, 2, 0) for frame in channels_first]
    assert not views[0].flags.c_contiguous
    for output_format in FILE_FORMATS:
        from_views, from_frames = (_decode(encode_video(each, output_format, 24, 90)) for each in (views, _waves(3)))
        assert _worst_psnr(from_views.frames, from_frames.frames) > 40


@pytest.mark.parametrize("output_format", FILE_FORMATS)
def test_an_error_of_the_frames_passes_through(output_format: str) -> None:
    def frames() -> Iterator[NDArray[np.uint8]]:
        yield from _waves(2)
        raise RuntimeError("the decoder failed")

    with pytest.raises(RuntimeError, match="the decoder failed"):
        encode_video(frames(), output_format, 24, 90)


@pytest.mark.parametrize("output_format", ["avi", "raw", "", "png", "B64_MP4"])
def test_an_unknown_format_is_refused(output_format: str) -> None:
    with pytest.raises(ValueError, match="must be one of mp4, webm, gif"):
        encode_video(_waves(1), output_format, 24, 90)


@pytest.mark.parametrize("fps", [0, -24, 0.001, 1001, float("nan"), float("inf")])
def test_frames_a_second_out_of_bounds_are_refused(fps: float) -> None:
    with pytest.raises(ValueError, match=r"fps=.* must be between"):
        encode_video(_waves(1), "mp4", fps, 90)


@pytest.mark.parametrize("quality", [0, 101])
def test_a_quality_out_of_bounds_is_refused(quality: int) -> None:
    with pytest.raises(ValueError, match="must be between 1 and 100"):
        encode_video(_waves(1), "mp4", 24, quality)


def test_a_video_of_no_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="no frames"):
        encode_video([], "mp4", 24, 90)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (np.zeros((16, 18, 3), dtype=np.uint8), r"frame 1 is \(16, 18, 3\); expected \(16, 16, 3\)"),
        (np.zeros((16, 16, 3), dtype=np.float32), "frame 1 is float32"),
        (np.zeros((16, 16, 4), dtype=np.uint8), r"expected uint8 \(H, W, 3\)"),
        (np.zeros((16, 16), dtype=np.uint8), r"expected uint8 \(H, W, 3\)"),
    ],
)
def test_frames_of_another_kind_are_refused(second: NDArray[np.uint8], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_video([np.zeros((16, 16, 3), dtype=np.uint8), second], "webm", 24, 90)


def test_nothing_heavy_is_loaded_before_a_video_is_encoded() -> None:
    code = "import sys, triton_diffusion.media; print({'av', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
