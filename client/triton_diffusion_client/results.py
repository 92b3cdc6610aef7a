"""What a request gives back: pictures or videos, and while they are made, progress and previews."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedImage:
    """One picture as the server made it: a file in `data`, or for the format `raw` its pixels."""

    seed: int
    """Asked for again with this seed, and all else the same, the picture is the same."""
    format: str
    """"png", "jpeg", "webp" or "raw"."""
    data: bytes
    """The file's content; for `raw` the pixels as they lie in `array`."""
    shape: tuple[int, int, int] | None = None
    """(height, width, 3) of a raw picture, otherwise None: the file says it."""

    @property
    def image(self) -> Image:
        """The picture for PIL."""
        if self.shape is None:
            return decode_image(self.data)
        from PIL import Image

        return Image.fromarray(self.array)

    @property
    def array(self) -> NDArray[np.uint8]:
        """The pixels (H, W, 3), 0 to 255."""
        if self.shape is None:
            return np.asarray(self.image.convert("RGB"), dtype=np.uint8)
        return np.frombuffer(self.data, dtype=np.uint8).reshape(self.shape)

    def save(self, path: str | Path) -> Path:
        """Write the file as the server encoded it; a raw picture is encoded by PIL as the name's ending says."""
        path = Path(path)
        if self.shape is None:
            path.write_bytes(self.data)
        else:
            self.image.save(path)
        return path


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedVideo:
    """One video as the server made it: a file in `data`, or for the format `raw` its frames."""

    seed: int
    """Asked for again with this seed, and all else the same, the video is the same."""
    format: str
    """"mp4", "webm", "gif" or "raw"."""
    data: bytes
    """The file's content; for `raw` the pixels as they lie in `array`."""
    shape: tuple[int, int, int, int] | None = None
    """(frames, height, width, 3) of a raw video, otherwise None: the file says it."""

    @property
    def array(self) -> NDArray[np.uint8]:
        """The pixels (F, H, W, 3), 0 to 255, of a raw video. Raises ValueError for a file: nothing here decodes it."""
        if self.shape is None:
            raise ValueError(f'the video is a {self.format} file; ask for output_format="raw" to get its frames')
        return np.frombuffer(self.data, dtype=np.uint8).reshape(self.shape)

    def save(self, path: str | Path) -> Path:
        """Write the file as the server encoded it. Raises ValueError for a raw video, which is none."""
        if self.shape is not None:
            raise ValueError('the video is raw frames; ask for output_format="mp4" to get a file, or take `array`')
        path = Path(path)
        path.write_bytes(self.data)
        return path


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where a request's time went, in seconds, measured by the server."""

    total_s: float
    queue_s: float = 0.0
    """Time spent waiting for a place in a batch, over all stages."""
    stages_s: Mapping[str, float] = field(default_factory=dict)
    """By stage name: "input_validation", "text_encoding", "denoising", "decoding"."""
    steps_s: tuple[float, ...] = ()
    """Each denoising step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationResult:
    """The end of a request: all its pictures, or all its videos."""

    outputs: tuple[GeneratedImage | GeneratedVideo, ...]
    """All of one kind."""
    timings: Timings
    request_id: str
    warnings: tuple[str, ...] = ()
    """What the server points out: a setting that has no effect on this model, for example."""

    @property
    def images(self) -> list[Image]:
        """The pictures for PIL; none where the server made videos."""
        return [output.image for output in self.outputs if isinstance(output, GeneratedImage)]

    @property
    def videos(self) -> list[bytes]:
        """The content of each video's file; none where the server made pictures, or sent frames (see `arrays`)."""
        return [output.data for output in self.outputs if isinstance(output, GeneratedVideo) and output.shape is None]

    @property
    def arrays(self) -> NDArray[np.uint8]:
        """The pixels of all pictures (N, H, W, 3), or of all raw videos (N, F, H, W, 3), 0 to 255."""
        return np.stack([output.array for output in self.outputs])

    @property
    def data(self) -> list[bytes]:
        """The content of each file."""
        return [output.data for output in self.outputs]

    @property
    def seeds(self) -> list[int]:
        """The seed of each output."""
        return [output.seed for output in self.outputs]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a request is."""

    stage: str
    step: int
    """Steps done of `total`; in the stage "denoising" these are the denoising steps."""
    total: int
    elapsed_s: float
    remaining_s: float | None = None
    """The server's estimate; None: not known yet."""
    restarts: int = 0
    """How often the request was started anew, because workers of the server died or because the client sent it again.
    `step` then goes back: to the last checkpoint, or to the beginning."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Preview:
    """What the pictures of a request look like after `step` of `total` steps."""

    step: int
    total: int
    data: tuple[bytes, ...]
    """An encoded picture each."""

    @property
    def images(self) -> list[Image]:
        """The pictures for PIL."""
        return [decode_image(data) for data in self.data]


Event = Progress | Preview | GenerationResult
"""What a stream yields: progress and previews, and at the end the result."""


def decode_image(data: bytes) -> Image:
    """The PIL picture in a file's content, fully read."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def file_format(data: bytes) -> str:
    """Which of the formats of pictures and videos a file has, by how it begins; "bin" for none of them."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return "mp4"
    return next((name for beginning, name in _BEGINNINGS.items() if data.startswith(beginning)), "bin")


_BEGINNINGS = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"\x1a\x45\xdf\xa3": "webm"}
