"""A rank that fails alone, while the other waits for it in the middle of a forward pass."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
from triton_diffusion.config import ParallelConfig
from triton_diffusion.distributed import group as group_module

rank, store = int(sys.argv[1]), sys.argv[2]
group_module.RANKS_TIMEOUT_S = 1.0
group = group_module.RankGroup(
    rank=rank, size=2, device=torch.device("cpu"), store=dist.FileStore(store, 2), parallel=ParallelConfig(ulysses=2)
)
failures = {}
try:
    if rank == 1:
        raise MemoryError("rank 1 has no memory left")
    group.mesh.ulysses.all_reduce(torch.ones(3))
except (MemoryError, RuntimeError) as error:
    failures = {"request": error}
try:
    group.agree(failures)
except group_module.RanksDivergedError as error:
    print(f"RanksDivergedError: {error}", file=sys.stderr, flush=True)
    # As the rank's program does: an orderly end would wait for the other.
    os._exit(1)
"""


def test_it_ends_itself_soon_instead_of_waiting_for_ever(tmp_path: Path) -> None:
    """Its process ends, and by that the worker group is started anew and its requests are replayed."""
    started_s = time.monotonic()
    ranks = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        _, text = ranks[1].communicate(timeout=60)
        assert ranks[1].returncode == 1
        assert b"RanksDivergedError: rank 1 failed alone (rank 1 has no memory left)" in text
        # The end of its connection ends the collective of the other.
        ranks[0].communicate(timeout=30)
        assert time.monotonic() - started_s < 60
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
