"""What dies comes back or leaves a clear error, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.end_to_end.conftest import STAGES, RunningServer, own_server
from tests.end_to_end.test_server_faults import QUICKLY_LOADED
from tests.end_to_end.test_stream import progress_of, stream
from tritonclient.utils import InferenceServerException

from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion_client import DiffusionClient

pytestmark = pytest.mark.end_to_end

PROMPT = "a large red circle"


POISON = "a large red cup of hemlock"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo checkpoint, from which a test may take something away."""
    return shutil.copytree(open_checkpoint("demo").path, tmp_path_factory.mktemp("checkpoint") / "demo")


@pytest.fixture(scope="module")
def fragile(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose denoising ranks die of one prompt, and that has little patience with ranks that are stuck."""
    settings = {
        "model_path": str(checkpoint),
        "dtype": "float32",
        "max_batch_tokens": "1000",
        "watchdog_floor_s": "8",
        "crash_loop_restarts": "3",
        "text_encoding.prompt_cache_bytes": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DIFFUSION_FAULTS", f"stage=denoising;kill_prompt={POISON}")
        with own_server(tmp_path_factory.mktemp("fragile"), settings) as server:
            yield server


@pytest.fixture(scope="module")
def undisturbed(fragile: RunningServer) -> list[np.ndarray]:
    return [picture(fragile, seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def rested(request: pytest.FixtureRequest) -> None:
    """A test begins when the ranks are back that the one before has killed."""
    if "fragile" in request.fixturenames:
        for stage in STAGES:
            request.getfixturevalue("fragile").wait_for_metric("ready_replicas", stage, 1, timeout_s=120)


def picture(server: RunningServer, seed: int) -> np.ndarray:
    pixels: np.ndarray = server.infer(prompt=PROMPT, num_inference_steps=20, seed=seed, output_format="raw").as_numpy(
        "raw_image"
    )
    return pixels


def assert_same(pictures: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for ours, theirs in zip(pictures, expected, strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize("stage", STAGES)
def test_requests_survive_the_death_of_a_rank_with_the_same_pictures(
    fragile: RunningServer, undisturbed: list[np.ndarray], stage: str
) -> None:
    (rank,) = fragile.ranks(stage)
    # So that they are surely in its hands when it dies.
    rank.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(picture, fragile, seed) for seed in range(3)]
        fragile.wait_until_running(stage)
        rank.send_signal(signal.SIGKILL)
        assert_same([future.result(timeout=120) for future in futures], undisturbed)
    assert fragile.ranks(stage) != [rank]


@pytest.mark.parametrize("stage", STAGES)
def test_requests_survive_a_rank_that_is_stopped_with_the_same_pictures(
    fragile: RunningServer, undisturbed: list[np.ndarray], stage: str
) -> None:
    (rank,) = fragile.ranks(stage)
    kills = fragile.metric("watchdog_kills_total", stage)
    rank.send_signal(signal.SIGSTOP)
    assert_same([picture(fragile, 0)], undisturbed[:1])
    fragile.wait_for_metric("watchdog_kills_total", stage, kills + 1)
    assert not rank.is_running()


def test_a_stream_tells_that_its_request_goes_on_from_a_checkpoint(
    fragile: RunningServer, undisturbed: list[np.ndarray]
) -> None:
    (rank,) = fragile.ranks("denoising")
    killed_s, told = 0.0, None
    with stream(fragile, prompt=PROMPT, num_inference_steps=20, seed=1, output_format="raw") as responses:
        for response in responses:
            if (progress := progress_of(response)) is None:
                assert_same([response.as_numpy("raw_image")], undisturbed[1:2])
            elif not killed_s and progress["step"] >= 12:
                rank.send_signal(signal.SIGKILL)
                killed_s = time.monotonic()
            elif progress["restarts"] == 1 and told is None:
                told = progress
                print(f"told after {time.monotonic() - killed_s:.3f} s")
                assert time.monotonic() - killed_s < 5
            elif told is not None and progress["step"] == told["step"] + 1:
                print(f"went on after {time.monotonic() - killed_s:.1f} s")
    assert told is not None
    assert told["step"] >= 5


def test_a_request_that_kills_its_ranks_is_given_up_and_the_others_are_drawn(
    fragile: RunningServer, undisturbed: list[np.ndarray]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        culprit = pool.submit(fragile.infer, prompt=POISON, num_inference_steps=20)
        innocent = [pool.submit(picture, fragile, seed) for seed in range(3)]
        assert_same([future.result(timeout=180) for future in innocent], undisturbed)
        error = culprit.exception(timeout=180)
    assert isinstance(error, InferenceServerException)
    assert error.status() == "StatusCode.INTERNAL"
    assert "died 3 times at the same steps of this request" in error.message()
    fragile.wait_for_metric("requests_given_up_total", "denoising", 1)


def test_a_crash_loop_answers_unavailable_until_the_ranks_start_again(
    fragile: RunningServer, undisturbed: list[np.ndarray], checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Our client asks again by itself, and gets the picture that it would have had."""
    (weights,) = (checkpoint / "vae").glob("*.safetensors")
    hidden = weights.rename(weights.with_suffix(".away"))
    (rank,) = fragile.ranks("decoding")
    rank.send_signal(signal.SIGKILL)
    with pytest.raises(InferenceServerException) as caught:
        picture(fragile, 0)
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert "died 3 times in a row" in caught.value.message()
    assert str(checkpoint) not in caught.value.message()
    with DiffusionClient(fragile.grpc_url) as client, ThreadPoolExecutor(1) as pool:
        patient = pool.submit(client.generate, PROMPT, num_inference_steps=20, seed=1, output_format="raw")
        while "attempt 2 of" not in caplog.text:
            assert not patient.done()
            time.sleep(0.05)
        hidden.rename(weights)
        assert_same([patient.result(120).arrays], undisturbed[1:2])
    fragile.wait_for_metric("ready_replicas", "decoding", 1)


def test_a_full_chain_refuses_with_unavailable_and_recovers(tmp_path: Path) -> None:
    with own_server(tmp_path, QUICKLY_LOADED | {"max_concurrent_requests": "2"}) as server:
        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(server.infer, prompt=PROMPT, num_inference_steps=100) for _ in range(6)]
            errors = [error for future in futures if (error := future.exception()) is not None]
        assert 0 < len(errors) < 6
        for error in errors:
            assert isinstance(error, InferenceServerException)
            assert error.status() == "StatusCode.UNAVAILABLE"
            assert "max_concurrent_requests" in error.message()
        assert server.infer(prompt=PROMPT, num_inference_steps=1) is not None


def test_no_process_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    with own_server(tmp_path, QUICKLY_LOADED) as server:
        processes = psutil.Process(server.process.pid).children(recursive=True)
        assert len(server.ranks()) == 3
        os.kill(server.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive
