"""Where the command line puts pictures and videos, and how it names them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from triton_diffusion_client.results import file_format

_SUFFIXES = {"jpeg": ".jpg"}
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_FORMATS |= {".mp4": "mp4", ".webm": "webm", ".gif": "gif"}
_MAX_SLUG_LENGTH = 60


@dataclass(frozen=True)
class OutputFiles:
    """A folder to fill, or the one file to write. In a folder a file's suffix is that of its content."""

    path: Path
    is_file: bool
    output_format: str | None
    """To ask the server for; None: its own choice."""

    def save_output(self, data: bytes, prompt: str, seed: int) -> Path:
        """Write a picture or video. In a folder nothing is overwritten; a file that was named is."""
        if self.is_file:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(data)
            return self.path
        return _save_new(self.path, f"{slugify(prompt)}-{seed}", data)

    def save_preview(self, data: bytes, prompt: str, step: int) -> Path:
        """Write a preview, under a name that tells its step."""
        folder, name = (self.path.parent, self.path.stem) if self.is_file else (self.path, slugify(prompt))
        return _save_new(folder, f"{name}-step-{step:03}", data)


def _save_new(folder: Path, name: str, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    kind = file_format(data)
    suffix = _SUFFIXES.get(kind, f".{kind}")
    count = 1
    while True:
        path = folder / f"{name}{'' if count == 1 else f'-{count}'}{suffix}"
        try:
            with path.open("xb") as file:
                file.write(data)
            return path
        except FileExistsError:
            count += 1


def plan_output(output: str, output_format: str | None, num_outputs: int) -> OutputFiles:
    """A path that ends like a picture or video is a file, any other a folder. Raises ValueError for a contradiction."""
    path = Path(output)
    named_format = None if path.is_dir() or output.endswith("/") else _FORMATS.get(path.suffix.lower())
    if named_format is None:
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"{output} is a file, but no picture or video; name a folder, or a file that ends with one of "
                f"{', '.join(_FORMATS)}"
            )
        return OutputFiles(path, False, output_format)
    if output_format not in (None, named_format):
        raise ValueError(f"{output} is a {named_format} file, but the output format is {output_format}; change one")
    if num_outputs != 1:
        raise ValueError(f"{output} is one file, but {num_outputs} outputs are asked for; name a folder")
    return OutputFiles(path, True, named_format)


def slugify(prompt: str) -> str:
    """The beginning of a prompt as part of a file name: lower-case letters and digits of any script, and hyphens."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", prompt).lower()).strip("-")
    if len(words) > _MAX_SLUG_LENGTH:
        words = words[: _MAX_SLUG_LENGTH + 1].rpartition("-")[0] or words[:_MAX_SLUG_LENGTH]
    # File systems count bytes: 255 for the whole name.
    return words.encode()[:180].decode(errors="ignore").strip("-") or "picture"
