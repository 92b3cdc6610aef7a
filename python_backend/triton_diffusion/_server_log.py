"""The server's output: copied, and searched for what became of the models."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import deque
from pathlib import Path
from typing import IO

from triton_diffusion.errors import ConfigurationError

_MODEL_IS_LOADED = re.compile(r"successfully loaded '([^']+)'")
_MODEL_FAILED = re.compile(r"failed to load '([^']+)' version \d+: (.+?)\"?$")
# What the server says of its own start, apart from the models; after a wrong argument it prints all its help.
_COMPLAINT = re.compile(r"unrecognized option|^Bad option|^invalid |^error: |failed to start", re.IGNORECASE)


class ServerLog:
    """The server's output: copied to a file or to stderr, and searched for what became of the models."""

    def __init__(self, file: Path | None) -> None:
        self.loaded_models: list[str] = []
        self.failed_models: dict[str, str] = {}
        self.complaints: list[str] = []
        self._lines: deque[str] = deque(maxlen=400)
        self._sink: IO[str] = sys.stderr
        self._owns_sink = file is not None
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._sink = file.open("a", encoding="utf-8")
            except OSError as error:
                raise ConfigurationError(f"log_file={str(file)!r} cannot be written: {error}") from error

    def read(self, stream: IO[str]) -> None:
        """Copy all lines. Whatever happens to the copy, read on: the server blocks when nobody does."""
        for line in stream:
            self._lines.append(line.rstrip("\n"))
            self._note(line.rstrip())
            with contextlib.suppress(OSError, ValueError):
                self._sink.write(line)
                self._sink.flush()

    def tail(self, num_lines: int = 20) -> str:
        return "\n".join(list(self._lines)[-num_lines:])

    def close(self) -> None:
        if self._owns_sink:
            self._sink.close()

    def _note(self, line: str) -> None:
        if loaded := _MODEL_IS_LOADED.search(line):
            self.loaded_models.append(loaded[1])
        elif _COMPLAINT.search(line):
            self.complaints.append(line)
        elif failed := _MODEL_FAILED.search(line):
            # The error itself; its traceback, which Triton writes as "\\n\\nAt:\\n ...", stays in the log.
            reason, _, _ = failed[2].partition("\\n\\nAt:")
            self.failed_models[failed[1]] = reason.removeprefix("Internal: ").replace("\\n", "\n    ")
