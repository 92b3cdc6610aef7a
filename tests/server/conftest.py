"""A tiny model repository for the real tritonserver, and a look at what a server leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = """
name: "identity"
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_UINT8 dims: [ -1 ] } ]
output [ { name: "x" data_type: TYPE_UINT8 dims: [ -1 ] } ]
instance_group [ { count: 1 kind: KIND_MODEL } ]
"""

MODEL = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        {execute}
        return [pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(r, "x")]) for r in requests]

    def finalize(self):
        {finalize}
"""

WriteModel = Callable[..., Path]
Leftovers = Callable[[int, int], list[str]]


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Write a repository with the model "identity"; statements may be added to its methods."""

    def write(initialize: str = "pass", execute: str = "pass", finalize: str = "pass") -> Path:
        folder = tmp_path / "models" / "identity"
        (folder / "1").mkdir(parents=True, exist_ok=True)
        (folder / "config.pbtxt").write_text(CONFIG)
        (folder / "1" / "model.py").write_text(MODEL.format(initialize=initialize, execute=execute, finalize=finalize))
        return folder.parent

    return write


@pytest.fixture
def leftovers() -> Leftovers:
    """What is left of a server: the live processes of its group, and the shared memory of its owner.

    The owner may have had another server before the test began.
    """
    before = set(Path("/dev/shm").iterdir())

    def find(server_pid: int, owner_pid: int) -> list[str]:
        segments = set(Path("/dev/shm").glob(f"triton_diffusion_{owner_pid}_*")) - before
        shared_memory = [str(path) for path in sorted(segments)]
        return shared_memory + [f"process {pid}" for pid in _group_members(server_pid)]

    return find


def _group_members(group: int) -> list[int]:
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = stat.read_text().rpartition(") ")
        except OSError:
            continue  # it ended while we looked
        state, _parent, process_group = rest.split()[:3]
        if int(process_group) == group and state != "Z":
            members.append(int(stat.parent.name))
    return members


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Fail unless a condition comes true within some seconds."""

    def wait(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s"
            time.sleep(0.05)

    return wait


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, here and in child processes: a test sees what stays."""
    folder = tmp_path_factory.mktemp("tmp")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder
