"""What every test of the runtime sees: a folder of its own for the sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="package", autouse=True)
def run_dirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where services put their folders; nothing may stay there in the end."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        yield folder
    assert not list(folder.iterdir())
