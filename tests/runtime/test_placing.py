"""Where a stage runs that nobody has placed: replicas and cores of small checkpoints on a machine without GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from triton_diffusion.config import StageConfig
from triton_diffusion.loading.checkpoint import Checkpoint, open_checkpoint
from triton_diffusion.runtime import placing, rank_process
from triton_diffusion.runtime.placing import place_on_cores
from triton_diffusion.runtime.rank_process import group_cores, more_cores


@pytest.fixture
def checkpoint() -> Checkpoint:
    """A small one."""
    return open_checkpoint("demo")


def have(monkeypatch: pytest.MonkeyPatch, num_cores: int, *, gpus: bool = False) -> None:
    """A machine with so many cores that this process may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))
    for module in (placing, rank_process):
        monkeypatch.setattr(module, "has_gpus", lambda: gpus)


@pytest.mark.parametrize(
    ("num_cores", "replicas", "cores_of_each"), [(2, 2, 1), (3, 3, 1), (4, 4, 1), (5, 4, 1), (6, 3, 2), (16, 4, 4)]
)
def test_denoising_has_replicas_that_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, num_cores: int, replicas: int, cores_of_each: int
) -> None:
    have(monkeypatch, num_cores)
    config = place_on_cores(StageConfig(), "denoising", checkpoint)
    assert (config.num_replicas, config.ranks_per_replica) == (replicas, 1)
    assert (config.cores_per_rank, config.threads_per_rank) == (cores_of_each, num_cores)
    own = [core for replica in range(replicas) for core in group_cores(config, replica)]
    assert own == list(range(replicas * cores_of_each))
    for replica in range(replicas):
        assert sorted([*group_cores(config, replica), *more_cores(config, replica)]) == list(range(num_cores))


def test_other_stages_have_one_replica_on_the_cores_of_one(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    have(monkeypatch, 4)
    config = place_on_cores(StageConfig(), "decoding", checkpoint)
    assert config.num_replicas == 1
    assert (group_cores(config, 0), more_cores(config, 0)) == ([0], [1, 2, 3])


def test_one_core_has_one_replica(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    have(monkeypatch, 1)
    assert place_on_cores(StageConfig(), "denoising", checkpoint) == StageConfig()


@pytest.mark.parametrize(
    "given",
    [
        {"num_gpus": 1},
        {"dp_size": 1},
        {"gpu_device_ids": "0"},
        {"num_threads": 2},
        {"num_cores": 1},
        {"tp_size": 2},
        {"ulysses_degree": 2},
        {"ring_degree": 2},
        {"enable_cfg_parallel": True},
        {"take_turns": False},
    ],
)
def test_what_the_operator_says_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, given: dict[str, int | str | bool]
) -> None:
    have(monkeypatch, 4)
    config = StageConfig(**given)  # type: ignore[arg-type]
    assert place_on_cores(config, "denoising", checkpoint) is config


def test_with_gpus_nothing_is_placed_on_cores(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    have(monkeypatch, 4, gpus=True)
    config = place_on_cores(StageConfig(), "denoising", checkpoint)
    assert config == StageConfig()
    assert group_cores(config, 0) == more_cores(config, 0) == []


def test_a_large_checkpoint_has_one_replica_on_all_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    have(monkeypatch, 4)
    (tmp_path / "transformer").mkdir()
    with (tmp_path / "transformer" / "model.safetensors").open("wb") as file:
        file.truncate(300 << 20)
    config = place_on_cores(StageConfig(), "denoising", Checkpoint(tmp_path))
    assert config == StageConfig()
    assert (group_cores(config, 0), more_cores(config, 0)) == ([0, 1, 2, 3], [])
