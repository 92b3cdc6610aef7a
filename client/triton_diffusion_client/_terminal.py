"""What the commands that ask a server have in common: their exit codes, and lines that spare the progress bars."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_INTERRUPTED = 130


def print_line(line: str, file: TextIO) -> None:
    """One line, out of the way of the progress bars."""
    tqdm.write(line, file=file)


def print_error(message: str) -> None:
    """One line on stderr, however the message was laid out."""
    print_line(f"error: {' '.join(message.split())}", sys.stderr)
