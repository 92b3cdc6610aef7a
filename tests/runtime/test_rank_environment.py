"""What a rank finds in its environment: its own GPU, counted within what the operator made visible."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from triton_diffusion.runtime.rank_process import _rank_environment


@pytest.mark.parametrize(
    ("visible", "device_id", "expected"),
    [
        (None, "1", "1"),
        ("4,5", "1", "5"),
        ("GPU-a,GPU-b", "0", "GPU-a"),
        ("4,5", "GPU-c", "GPU-c"),
        ("4", "1", "-1"),
        ("", "0", ""),
    ],
)
def test_gpu_ids_count_within_what_is_visible(visible: str | None, device_id: str, expected: str) -> None:
    base = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert _rank_environment(base, device_id, 3, 0)["CUDA_VISIBLE_DEVICES"] == expected


def test_each_thread_of_a_rank_on_the_cpu_has_a_core_unless_the_operator_says_otherwise() -> None:
    cores = sorted(os.sched_getaffinity(0))
    environment = _rank_environment({}, "0", 2, first_core=1)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["OMP_PROC_BIND"] == "true"
    assert environment["OMP_PLACES"] == f"{{{cores[1 % len(cores)]}}},{{{cores[2 % len(cores)]}}}"
    assert _rank_environment({"OMP_PROC_BIND": "false"}, "0", 2, 0)["OMP_PROC_BIND"] == "false"


def test_a_rank_of_one_thread_is_not_bound_to_a_core() -> None:
    assert "OMP_PROC_BIND" not in _rank_environment({}, "0", 1, 0)


def test_a_rank_is_imported_on_all_cores_and_then_bound_to_its_own() -> None:
    """Ranks of all stages once shared the first core while they were imported, and the second was idle."""
    program = """
import os
from triton_diffusion.runtime.rank_main import _on_all_cores
with _on_all_cores():
    print(sorted(os.sched_getaffinity(0)))
print(sorted(os.sched_getaffinity(0)))
"""
    operators = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment = operators | _rank_environment({}, "0", 2, first_core=0)
    python = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    cores = sorted(os.sched_getaffinity(0))
    assert python.stdout.splitlines() == [str(cores), str(cores[:1])]
