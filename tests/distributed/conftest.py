"""What all tests of this folder share: the process that their ranks are forked from."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import forkserver

import pytest


@pytest.fixture(scope="package", autouse=True)
def no_fork_server_is_left() -> Iterator[None]:
    """It would end by itself some time after the tests."""
    yield
    forkserver._forkserver._stop()
