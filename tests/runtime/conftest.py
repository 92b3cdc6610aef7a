"""What tests of the runtime share: a folder of its own for the sockets, and what ranks are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints.reference import Reference
from checkpoints.stages import InProcessStages


@pytest.fixture(scope="package", autouse=True)
def run_dirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where services put their folders; nothing may stay there in the end."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        yield folder
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def reference(flux_checkpoint: Path) -> Reference:
    return Reference(flux_checkpoint)


@pytest.fixture(scope="module")
def in_process(flux_checkpoint: Path) -> InProcessStages:
    return InProcessStages(flux_checkpoint)
