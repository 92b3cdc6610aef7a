"""A service's beginning and end: nothing is left, whatever it ends of."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from checkpoints.requests import make_blob, make_request
from checkpoints.services import error_of, run_service
from checkpoints.timing import wait_until
from triton_diffusion.config import StageConfig
from triton_diffusion.errors import ConfigurationError, ShuttingDownError, WorkerGroupError
from triton_diffusion.runtime.service import StageService

OWNER = """
import sys, time
from triton_diffusion.config import StageConfig
from triton_diffusion.runtime.service import StageService

service = StageService("decoding", StageConfig(model_path=sys.argv[1], num_gpus=2, dp_size=1, num_threads=1))
service.start()
print(*service._replicas[0].group.pids, flush=True)
time.sleep(600)
"""


@pytest.fixture
def own_run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's services put their folders."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_stop_answers_what_is_still_there_and_leaves_nothing(flux_checkpoint: Path, own_run_dir: Path) -> None:
    with run_service("text_encoding", flux_checkpoint) as encoder:
        encoded = encoder.run(make_blob("r", make_request(num_inference_steps=100_000)))
    with run_service("denoising", flux_checkpoint) as caller:
        running = caller.send(encoded)
        caller.progress("r", 1)
        waiting = caller.send(make_blob("waiting", make_request(height=64)))
        pids = caller.pids()
        assert all(is_running(pid) for pid in pids)
        assert list(own_run_dir.iterdir())
    assert isinstance(error_of(running), ShuttingDownError)
    assert isinstance(error_of(waiting), ShuttingDownError)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not list(own_run_dir.iterdir())
    assert isinstance(error_of(caller.send(make_blob("late"))), ShuttingDownError)
    caller.service.stop()


def test_ranks_end_when_the_process_that_owns_them_is_killed(flux_checkpoint: Path, own_run_dir: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(flux_checkpoint)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        assert len(list(own_run_dir.iterdir())) == 1
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        owner.stdout.close()  # type: ignore[union-attr]
    wait_until(lambda: not any(is_running(pid) for pid in pids), timeout_s=10)
    wait_until(lambda: not list(own_run_dir.iterdir()), timeout_s=5)


def test_a_rank_that_cannot_load_gives_the_reason(flux_checkpoint: Path, tmp_path: Path, own_run_dir: Path) -> None:
    broken = shutil.copytree(flux_checkpoint, tmp_path / "broken")
    (file,) = (broken / "vae").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    before = set(psutil.Process().children(recursive=True))
    service = StageService("decoding", StageConfig(model_path=str(broken), num_gpus=2, dp_size=1, num_threads=1))
    with pytest.raises(WorkerGroupError, match=r"replica 0 of decoding: .*pickled weights"):
        service.start()
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not list(own_run_dir.iterdir())
    service.stop()


def test_a_rank_that_is_too_slow_to_load_is_given_up(flux_checkpoint: Path, own_run_dir: Path) -> None:
    config = StageConfig(model_path=str(flux_checkpoint), num_threads=1, startup_timeout_s=0.3)
    service = StageService("decoding", config)
    with pytest.raises(WorkerGroupError, match=r"did not load within startup_timeout_s=0.3"):
        service.start()
    assert not list(own_run_dir.iterdir())


def test_a_checkpoint_that_is_missing_is_refused_before_any_process_starts(own_run_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="/nowhere"):
        StageService("decoding", StageConfig(model_path="/nowhere"))
    assert not list(own_run_dir.iterdir())
