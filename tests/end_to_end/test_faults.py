"""What dies comes back or leaves a clear error, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.end_to_end.conftest import RunningServer, own_server
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.end_to_end

PROMPT = "a large red circle"


def test_requests_survive_the_death_of_a_rank_with_the_same_pictures(server: RunningServer) -> None:
    options = {"prompt": PROMPT, "num_inference_steps": 40, "output_format": "raw"}
    undisturbed = [server.infer(seed=seed, **options).as_numpy("raw_image") for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(server.infer, seed=seed, **options) for seed in range(3)]
        time.sleep(0.4)
        (rank,) = server.ranks("denoising")
        rank.send_signal(signal.SIGKILL)
        pictures = [future.result(timeout=120).as_numpy("raw_image") for future in futures]
    for expected, picture in zip(undisturbed, pictures, strict=True):
        assert np.abs(expected.astype(int) - picture.astype(int)).max() <= 1
    assert server.ranks("denoising") != [rank]


def test_a_full_chain_refuses_with_unavailable_and_recovers(tmp_path: Path) -> None:
    with own_server(tmp_path, {"max_concurrent_requests": "2"}) as server:
        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(server.infer, prompt=PROMPT, num_inference_steps=100) for _ in range(6)]
            errors = [error for future in futures if (error := future.exception()) is not None]
        assert 0 < len(errors) < 6
        for error in errors:
            assert isinstance(error, InferenceServerException)
            assert error.status() == "StatusCode.UNAVAILABLE"
            assert "max_concurrent_requests" in error.message()
        assert server.infer(prompt=PROMPT, num_inference_steps=1) is not None


def test_every_request_is_answered_when_the_server_is_told_to_end(tmp_path: Path) -> None:
    """Triton lets no model call another once it stops: a request that still has a stage before it is sent away."""
    with own_server(tmp_path, {}) as server:
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(server.infer, prompt=PROMPT, num_inference_steps=150) for _ in range(2)]
            time.sleep(1)
            server.process.terminate()
            for future in futures:
                error = future.exception(timeout=120)
                assert isinstance(error, InferenceServerException)
                assert error.status() == "StatusCode.UNAVAILABLE"
                assert "the server is stopping; try again" in error.message()
        assert server.process.wait(60) == 0


def test_no_process_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    with own_server(tmp_path, {}) as server:
        processes = psutil.Process(server.process.pid).children(recursive=True)
        assert len(server.ranks()) == 3
        os.kill(server.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive
