"""Environment variables that processes which are compared must have alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

# What the threads of an OpenMP library do, how many there are, and what glibc does with memory that is freed.
_TUNING_PREFIXES = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_")


def tuning_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Those variables of an environment that OpenMP libraries and glibc's malloc read."""
    return {name: value for name, value in variables.items() if name.startswith(_TUNING_PREFIXES)}


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started within have these variables, too."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
