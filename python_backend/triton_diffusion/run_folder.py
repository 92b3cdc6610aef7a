"""What a server and its chain models tell each other, by empty files in a folder that only they can reach.

`TritonServer` makes the folder (mode 0700) and hands its name down by the environment. A model that was started by a
plain tritonserver has none, and none of this happens. Files, and not requests: whoever may send requests must not be
able to send these orders, and they work while Triton takes no requests any more.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

VARIABLE = "TRITON_DIFFUSION_RUN_FOLDER"

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
        # The folder goes with a server that has ended.
        with contextlib.suppress(FileNotFoundError):
            (self._path / _DRAIN).touch(mode=0o600)

    def chains(self) -> set[int]:
        """Process ids of the chain models that were loaded, also of those that ended since."""
        return {int(path.name.partition("-")[2]) for path in self._path.glob("chain-*")}

    def is_drained(self, pid: int) -> bool:
        """Whether a chain has seen the order and has no request any more."""
        return (self._path / f"drained-{pid}").exists()


class ChainFolder:
    """The folder, as a chain model sees it; without a folder nothing is ordered and nothing told."""

    def __init__(self) -> None:
        folder = os.environ.get(VARIABLE)
        self._path = Path(folder) if folder and os.path.isdir(folder) else None
        self._drain = os.path.join(folder, _DRAIN) if self._path and folder else ""
        self._touch("chain")

    def is_draining(self) -> bool:
        """Whether no new requests are to be taken."""
        return bool(self._drain) and os.path.exists(self._drain)

    def tell_drained(self) -> None:
        """All requests have been answered."""
        self._touch("drained")

    def _touch(self, what: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._path is not None:
                (self._path / f"{what}-{os.getpid()}").touch(mode=0o600)
