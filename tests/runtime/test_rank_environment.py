"""What a rank finds in its environment: its own GPU, counted within what the operator made visible."""

from __future__ import annotations

import pytest

from triton_diffusion.runtime.worker_group import _rank_environment


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
    assert _rank_environment(base, device_id, 3)["CUDA_VISIBLE_DEVICES"] == expected


def test_threads_are_bounded_and_do_not_spin_unless_the_operator_says_so() -> None:
    assert _rank_environment({}, "0", 3)["OMP_NUM_THREADS"] == "3"
    assert _rank_environment({}, "0", 3)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert _rank_environment({"OMP_WAIT_POLICY": "ACTIVE"}, "0", 3)["OMP_WAIT_POLICY"] == "ACTIVE"
