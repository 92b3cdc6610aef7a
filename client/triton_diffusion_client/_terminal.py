"""What the commands that ask a server have in common: exit codes, how they report errors, how they reach the server."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from triton_diffusion_client.errors import (
    DeadlineExceededError,
    DiffusionClientError,
    InvalidRequestError,
    RequestTimeoutError,
)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_INTERRUPTED = 130

Hints = Mapping[type[Exception], str]
"""By kind of error, what to do about it."""

_HINTS: Hints = {
    RequestTimeoutError: "allow more with --timeout-s",
    DeadlineExceededError: "allow more with --deadline-s, or take it late with --deadline-action continue",
}


def run_command(run: Callable[[], int], *, interrupted: str, hints: Hints | None = None) -> int:
    """The exit code of `run`, or of the error that it raised, which is reported.

    interrupted: what Ctrl-C leaves behind. hints: beside those for time-outs and deadlines.
    """
    try:
        with _warnings_on_the_terminal():
            return run()
    except KeyboardInterrupt:
        print_error(f"interrupted; {interrupted}")
        return EXIT_INTERRUPTED
    except (DiffusionClientError, ValueError, TypeError, OSError) as error:
        return report_error(error, hints=hints)


def report_error(error: Exception, *, where: str = "", hints: Hints | None = None) -> int:
    """Print an error with what to do about it, and return the exit code for it. where: what it is about."""
    hint = {**_HINTS, **(hints or {})}.get(type(error))
    attempts = error.attempts if isinstance(error, DiffusionClientError) else 1
    given_up = f" (given up after {attempts} attempts)" if attempts > 1 else ""
    print_error(f"{where}{error}{given_up}{f'; {hint}' if hint else ''}")
    return EXIT_INVALID if isinstance(error, InvalidRequestError | ValueError | TypeError) else EXIT_FAILED


def client_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a client that every command has."""
    return {
        "url": args.url,
        "protocol": args.protocol,
        "timeout_s": args.timeout_s,
        "headers": dict(args.header),
        "ssl": args.ssl,
    }


def retry_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a client whose requests may be sent again."""
    return {name: getattr(args, name) for name in ("retries", "retry_timeout_s", "connect_timeout_s")}


class _WarningLines(logging.Handler):
    """What the client logs, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print_line(f"warning: {record.getMessage()}", sys.stderr)


@contextmanager
def _warnings_on_the_terminal() -> Iterator[None]:
    logger, handler = logging.getLogger("triton_diffusion_client"), _WarningLines(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def print_line(line: str, file: TextIO) -> None:
    """One line, out of the way of the progress bars, without what would control the terminal: servers can send that."""
    printable = (each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in line)
    tqdm.write("".join(printable), file=file)


def print_error(message: str) -> None:
    """One line on stderr, however the message was laid out."""
    print_line(f"error: {' '.join(message.split())}", sys.stderr)
