"""What a server and the processes of its models tell each other, by empty files in a folder that only they can reach.

`TritonServer` makes the folder (mode 0700) and hands its name down by the environment. A model that was started by a
plain tritonserver has none, and none of this happens. Files, and not requests: whoever may send requests must not be
able to send these orders, and they work while Triton takes no requests any more.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

VARIABLE = "TRITON_DIFFUSION_RUN_FOLDER"

BEAT_S = 1.0
"""How often a model's process shows that it works."""

_DRAIN = "drain"


def find() -> str | None:
    """The folder of the server that we are a process of; None where it has none."""
    folder = os.environ.get(VARIABLE)
    return folder if folder and os.path.isdir(folder) else None


class RunFolder:
    """The folder, as the server sees it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def order_drain(self) -> None:
        """Have the chains refuse new requests and finish those that they have."""
        self._touch(_DRAIN)

    def chains(self) -> set[int]:
        """Process ids of the chain models that were loaded, also of those that ended since."""
        return self._pids("chain")

    def is_drained(self, pid: int) -> bool:
        """Whether a chain has seen the order and has no request any more."""
        return (self._path / f"drained-{pid}").exists()

    def beats(self) -> dict[int, int]:
        """By process id, the time of the last sign of life, in nanoseconds since the epoch."""
        beats: dict[int, int] = {}
        for pid in self._pids("alive"):
            # A model that is unloaded takes its file with it.
            with contextlib.suppress(FileNotFoundError):
                beats[pid] = (self._path / f"alive-{pid}").stat().st_mtime_ns
        return beats

    def worn_chains(self) -> set[int]:
        """Process ids of the chain models that asked to be replaced, also of those that were."""
        return self._pids("worn")

    def retire(self, pid: int) -> None:
        """Have a chain that was replaced end when it has answered its requests."""
        self._touch(f"retire-{pid}")

    def _pids(self, what: str) -> set[int]:
        return {int(path.name.partition("-")[2]) for path in self._path.glob(f"{what}-*")}

    def _touch(self, name: str) -> None:
        # The folder goes with a server that has ended.
        with contextlib.suppress(FileNotFoundError):
            (self._path / name).touch(mode=0o600)


class ModelFolder:
    """The folder, as a model's process sees it; without a folder nothing is ordered and nothing told."""

    def __init__(self) -> None:
        folder = find()
        self._path = Path(folder) if folder else None
        self._beat_s = 0.0

    def beat(self) -> None:
        """Show that this process works: from the first time on it is killed if it stops to. Cheap to call often."""
        now_s = time.monotonic()
        # Not the whole: who calls it once in that time is a little early now and then.
        if now_s - self._beat_s >= BEAT_S / 2:
            self._beat_s = now_s
            self._touch("alive")

    def end_beats(self) -> None:
        """Nobody is to wait for signs of life any more: the model ends, which may take its time."""
        if self._path is not None:
            self._file("alive", self._path).unlink(missing_ok=True)

    def _touch(self, what: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._path is not None:
                self._file(what, self._path).touch(mode=0o600)

    @staticmethod
    def _file(what: str, folder: Path) -> Path:
        return folder / f"{what}-{os.getpid()}"


class ChainFolder(ModelFolder):
    """The same for a chain model."""

    def __init__(self) -> None:
        super().__init__()
        self._drain = str(self._path / _DRAIN) if self._path is not None else ""
        self._touch("chain")

    def is_draining(self) -> bool:
        """Whether no new requests are to be taken."""
        return bool(self._drain) and os.path.exists(self._drain)

    def tell_drained(self) -> None:
        """All requests have been answered."""
        self._touch("drained")

    def tell_worn(self) -> None:
        """Ask for a new process in this one's place."""
        self._touch("worn")

    def is_retired(self) -> bool:
        """Whether another process takes the requests now."""
        return self._path is not None and self._file("retire", self._path).exists()
