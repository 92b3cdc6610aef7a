"""The program of a rank's process: `python -m triton_diffusion.runtime.rank_main`, started as a RankProcess.

Importing takes most of the time that a rank needs to start, so a process may do it before it is needed, as a spare.
Until it has its launch, lists of processes show it under the name SPARE_NAME.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

SPARE_NAME = "spare rank"
"""The name of a process that waits to take a rank's place, as `ps` and /proc/PID/comm show it."""


def main() -> int:
    """Import, wait for the launch, and run the rank until it is told to end; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline = sys.stdin.buffer
    if not select.select([lifeline], [], [], 0)[0]:
        _take_name(SPARE_NAME)
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage")
    parser.add_argument("--model-path")
    arguments, _ = parser.parse_known_args()
    # Only now: it takes seconds, in which the process shall have its name.
    with _on_all_cores():
        from triton_diffusion.runtime.rank import run
        from triton_diffusion.runtime.stage_loading import import_stage

        import_stage(arguments.stage, arguments.model_path)
    launch = lifeline.readline()
    if not launch:
        # The service is gone.
        return 0
    _take_name("rank")
    return run(launch, lifeline)


@contextlib.contextmanager
def _on_all_cores() -> Iterator[None]:
    """Within, this thread is not bound to a core: torch's OpenMP binds it when it is imported, and ranks of different
    stages, which start at the same time, to the same core.
    """
    all_cores = os.sched_getaffinity(0)
    import torch  # noqa: F401

    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, all_cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def _take_name(name: str) -> None:
    Path("/proc/self/comm").write_text(name)


if __name__ == "__main__":
    sys.exit(main())
