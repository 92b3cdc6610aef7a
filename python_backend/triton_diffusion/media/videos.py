"""A video to bytes, frame by frame: what is held at a time is the encoded video and the frames inside the encoder."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# PyAV takes 100 MB and is loaded by the first video, not by everyone who imports this package.
if TYPE_CHECKING:
    from av import VideoFrame

LOWEST_FPS = 0.01
HIGHEST_FPS = 1000.0
_MOST_THREADS = 8
"""An encoder left to itself takes all processors, and holds frames for each."""

_Pictures = Iterator[NDArray[np.uint8]]


def encode_video(frames: Iterable[NDArray[np.uint8]], output_format: str, fps: float, quality: int) -> bytes:
    """A video as mp4, webm or gif, or with the prefix b64_ as base64 text of such a file.

    - mp4: H.264 in yuv420p, its index before its pictures, so that a browser plays it while it loads. H.264 has no odd
      sizes in yuv420p: an odd side ends in one more row or column, equal to its last.
    - webm: VP9 in yuv420p, of any size.
    - gif: 256 colours chosen anew for each frame, dithered, repeated for ever. A GIF counts time in hundredths of a
      second: each frame starts at the nearest one. Browsers slow down frames shorter than two of them, so above 50
      frames a second frames are left out and the speed stays right.

    Colours are those of BT.709, limited range, and the mp4 and webm say so.

    Args:
        frames: uint8 (H, W, 3), all of one size; taken one at a time, each when the one before has been encoded.
        output_format: mp4, webm, gif, b64_mp4, b64_webm or b64_gif.
        fps: Frames a second, 0.01 to 1000. Kept as a fraction: 23.976, 29.97 and 59.94 are 24, 30 and 60 times
            1000/1001.
        quality: 1 to 100, made a constant rate factor (CRF) on a straight line: for mp4 from 51 to 14 (75 is x264's
            default, 23, and 90 shows no loss), for webm from 63 to 12. Without effect on gif.

    Raises:
        ValueError: no frame, frames of different sizes, or an argument out of bounds.
    """
    import av

    name = output_format.removeprefix("b64_")
    if name not in _CODINGS:
        raise ValueError(f"output_format={output_format!r} must be one of {', '.join(_CODINGS)}, alone or after b64_")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality={quality} must be between 1 and 100")
    coding, rate = _CODINGS[name], _frame_rate(fps)
    video_frames = coding.convert(_checked(frames), rate)
    first = next(video_frames, None)
    if first is None:
        raise ValueError("a video of no frames cannot be encoded; give at least one")
    buffer = io.BytesIO()

    def open_again(*_: object) -> io.BytesIO:
        """The file so far: the mp4 muxer reads it while it moves the pictures back to make room for the index."""
        return io.BytesIO(buffer.getvalue())

    with av.open(buffer, "w", format=name, container_options=coding.container_options, io_open=open_again) as container:
        stream = container.add_stream(
            coding.codec, rate=rate, options=coding.options(quality), time_base=first.time_base
        )
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, first.format.name
        stream.thread_type, stream.thread_count = "AUTO", min(_MOST_THREADS, os.cpu_count() or 1)
        if name != "gif":
            stream.color_range = stream.colorspace = stream.color_primaries = stream.color_trc = 1
        for frame in chain([first], video_frames):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = buffer.getvalue()
    return base64.b64encode(data) if output_format.startswith("b64_") else data


def _frame_rate(fps: float) -> Fraction:
    """The fraction that a decimal number stands for; the rates of NTSC are written with two or three digits."""
    if not (math.isfinite(fps) and LOWEST_FPS <= fps <= HIGHEST_FPS):
        raise ValueError(f"fps={fps} must be between {LOWEST_FPS} and {HIGHEST_FPS:g} frames a second")
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if abs(ntsc - Fraction(fps)) < 0.0002 else Fraction(fps).limit_denominator(1000)


def _checked(frames: Iterable[NDArray[np.uint8]]) -> _Pictures:
    shape = None
    for index, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise ValueError(f"frame {index} is {frame.dtype} {frame.shape}; expected uint8 (H, W, 3)")
        if frame.shape != shape:
            raise ValueError(f"frame {index} is {frame.shape}; expected {shape} like the frames before")
        yield frame


def _even_yuv_frames(pictures: _Pictures, rate: Fraction) -> Iterator[VideoFrame]:
    def padded(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width, _ = picture.shape
        return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    return _yuv_frames(map(padded, pictures), rate)


def _yuv_frames(pictures: _Pictures, rate: Fraction) -> Iterator[VideoFrame]:
    from av import VideoFrame
    from av.video.reformatter import ColorRange, Colorspace

    for index, picture in enumerate(pictures):
        rgb = VideoFrame.from_ndarray(picture, format="rgb24")
        # The default conversion is that of BT.601.
        frame = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        frame.pts, frame.time_base = index, 1 / rate
        yield frame


def _palette_frames(pictures: _Pictures, rate: Fraction) -> Iterator[VideoFrame]:
    from av import VideoFrame

    last_start = -2
    for index, picture in enumerate(pictures):
        start = round(100 * index / rate)
        if start - last_start < 2:
            continue
        last_start = start
        pair: Any = _with_palette(picture)
        frame = VideoFrame.from_ndarray(pair, format="pal8")
        frame.pts, frame.time_base = start, Fraction(1, 100)
        yield frame


def _with_palette(picture: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Indices (H, W) and a palette (256, 4) of alpha, red, green, blue.

    An octree and error diffusion take a few milliseconds. A median cut (Pillow's, or FFmpeg's palettegen) comes
    closer in single pixels, no closer in what the eye averages, and takes twenty times as long.
    """
    image = Image.fromarray(picture)
    colours = image.quantize(256, Image.Quantize.FASTOCTREE)
    indices = image.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
    rgb = np.asarray(indices.getpalette(), dtype=np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 4), dtype=np.uint8)
    palette[:, 0] = 255
    palette[: len(rgb), 1:] = rgb
    return np.asarray(indices), palette


@dataclass(frozen=True, kw_only=True)
class _Coding:
    """How a format is made."""

    codec: Literal["libx264", "libvpx-vp9", "gif"]
    convert: Callable[[_Pictures, Fraction], Iterator[VideoFrame]]
    """Pictures and frames a second to the encoder's frames, with their times."""
    options: Callable[[int], dict[str, str]]
    """The encoder's, for a quality."""
    container_options: dict[str, str]


def _h264_options(quality: int) -> dict[str, str]:
    # Beside the default preset, "veryfast" takes a quarter of the time for files of about the same size and error.
    return {"preset": "veryfast", "crf": f"{_on_line(quality, 51, 14):.1f}"}


def _vp9_options(quality: int) -> dict[str, str]:
    # "realtime" names the fast decisions; with them a video takes a third of the time at the same size and error.
    return {"deadline": "realtime", "cpu-used": "6", "row-mt": "1", "crf": f"{_on_line(quality, 63, 12):.0f}"}


def _on_line(quality: int, at_1: int, at_100: int) -> float:
    return at_1 + (at_100 - at_1) * (quality - 1) / 99


_CODINGS = {
    "mp4": _Coding(
        codec="libx264",
        convert=_even_yuv_frames,
        options=_h264_options,
        container_options={"movflags": "+faststart"},
    ),
    "webm": _Coding(
        codec="libvpx-vp9",
        convert=_yuv_frames,
        options=_vp9_options,
        # Without random identifiers: the same frames make the same file.
        container_options={"fflags": "+bitexact"},
    ),
    "gif": _Coding(codec="gif", convert=_palette_frames, options=lambda _: {}, container_options={}),
}
