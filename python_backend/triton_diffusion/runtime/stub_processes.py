"""The processes in which Triton runs Python models ("stubs"), found by what the system says of them.

Triton does not notice that a stub has died: the model stays ready, and requests in it are never answered. A process
that ended is seen at once, on any version of Triton, and without asking it anything.
"""

from __future__ import annotations

import os
from pathlib import Path

_STUB = b"triton_python_backend_stub"
# States of processes that have ended: "zombie" and "dead" of proc(5).
_ENDED = ("Z", "X")


def find_stubs(server_pid: int) -> dict[int, str]:
    """By process id, the models of the living stubs of a tritonserver."""
    stubs: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        state, parent = _state_and_parent(pid)
        if parent == server_pid and state not in _ENDED and (model := _model_of(pid)) is not None:
            stubs[pid] = model
    return stubs


def is_alive(pid: int) -> bool:
    """Whether the process has not ended; one that ended may wait for long until its parent takes notice."""
    return _state_and_parent(pid)[0] not in _ENDED


class StageStubs:
    """The processes of the stage models beside us, for a model of the server that is our parent process."""

    def __init__(self) -> None:
        self._server_pid = os.getppid()
        self._pids: dict[str, int] = {}

    def pid_of(self, model: str) -> int | None:
        """The living process of a model; None if it cannot be found. Looks for it only if the last one has ended."""
        pid = self._pids.get(model)
        if pid is None or not is_alive(pid):
            self._pids = {name: found for found, name in find_stubs(self._server_pid).items()}
        return self._pids.get(model)


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except (OSError, ValueError):
        return "X", 0
    return state, int(parent)


def _model_of(pid: int) -> str | None:
    """The model that a stub runs: its first argument is REPOSITORY/MODEL/VERSION/model.py."""
    try:
        program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    if not program.endswith(_STUB) or not arguments:
        return None
    parts = Path(os.fsdecode(arguments[0])).parts
    return parts[-3] if len(parts) >= 3 else None
