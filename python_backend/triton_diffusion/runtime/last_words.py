"""LastWords: why a rank can do no more, in a file that the service reads when the worker group has ended.

A rank that fails alone cannot tell rank 0, which waits for it in the middle of their work, and while it waits for the
others it may be killed. So it writes down what is the matter first, and takes it back if they come after all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from pathlib import Path

import msgspec

logger = logging.getLogger(__name__)

_SUFFIX = ".last-words"


class LastWords(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says before it ends."""

    message: str
    at_s: float = msgspec.field(default_factory=time.monotonic)
    """The clock is the same for all ranks: what the first one says is the cause of the others' failures."""
    memory_limit: int = 0
    """Tokens of a batch that is half of the one that ran out of memory; 0: none did, or it was a single row."""
    too_large: dict[str, str] = {}
    """Requests of which a single row does not fit in memory, and what their callers are told."""

    @property
    def is_of_memory(self) -> bool:
        """Whether it is about memory that is too small."""
        return bool(self.memory_limit or self.too_large)


def write_last_words(run_dir: str, rank: int, words: LastWords | None) -> None:
    """Leave the words of a rank in the group's folder; None takes them back. Never raises."""
    path = Path(run_dir, f"rank-{rank}{_SUFFIX}")
    try:
        if words is None:
            path.unlink(missing_ok=True)
            return
        with tempfile.NamedTemporaryFile(dir=run_dir, delete=False) as file:
            file.write(msgspec.json.encode(words))
        # The rank may be killed at any time: the file is never half of one.
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("rank %d cannot leave its last words: %s", rank, error)


def read_last_words(run_dir: str) -> LastWords | None:
    """What was said first in a group's folder, the rank's number before the message; None if no rank said anything."""
    said: list[LastWords] = []
    for path in Path(run_dir).glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            words = msgspec.json.decode(path.read_bytes(), type=LastWords)
            rank = path.name.removesuffix(_SUFFIX).replace("-", " ")
            said.append(msgspec.structs.replace(words, message=f"{rank}: {words.message}"))
    return min(said, key=lambda words: words.at_s, default=None)
