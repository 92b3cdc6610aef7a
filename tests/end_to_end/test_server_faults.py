"""What dies of the server itself comes back, its callers are told, and nothing is lost when it is told to end."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import tritonclient.grpc
from tests.end_to_end.conftest import RunningServer, own_server
from tritonclient.utils import InferenceServerException

from checkpoints.timing import wait_until
from triton_diffusion.runtime.stub_processes import find_stubs, is_alive
from triton_diffusion.supervisor import Supervisor
from triton_diffusion_client import DiffusionClient, GenerationResult, Progress

pytestmark = pytest.mark.end_to_end

PROMPT = "a large red circle"
# Nothing is measured and nothing warmed up: the models here are loaded again and again.
QUICKLY_LOADED = {"dtype": "float32", "max_batch_tokens": "1000", "warmup_resolutions": "none"}
SILENCE_S = 8.0


@dataclass
class Supervised:
    """A server with its supervisor, and what that reported."""

    server: RunningServer
    reports: list[str]

    def stub(self, model: str) -> int:
        """The process of a model."""
        (pid,) = [pid for pid, name in find_stubs(self.server.process.pid).items() if name == model]
        return pid

    def wait_for_report(self, text: str, timeout_s: float = 180.0) -> None:
        """Return when the supervisor has said it."""
        wait_until(lambda: any(text in line for line in self.reports), timeout_s)


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    with own_server(tmp_path_factory.mktemp("supervised"), QUICKLY_LOADED) as server:
        reports: list[str] = []
        supervisor = Supervisor(server.process, reports.append, silence_s=SILENCE_S)
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        yield Supervised(server, reports)
        server.process.stop()
        thread.join(60)
        assert not thread.is_alive()


def unavailable(error: BaseException | None) -> bool:
    return isinstance(error, InferenceServerException) and error.status() == "StatusCode.UNAVAILABLE"


def test_callers_of_a_stage_that_died_are_told_and_it_is_loaded_anew(supervised: Supervised) -> None:
    server, stub = supervised.server, supervised.stub("denoising")
    ranks = server.ranks("denoising")
    chain = supervised.stub("diffusion")
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(server.infer, prompt=PROMPT, num_inference_steps=200) for _ in range(8)]
        wait_until(lambda: server.metric("running_requests", "denoising") == 8)
        os.kill(stub, signal.SIGKILL)
        assert all(unavailable(future.exception(60)) for future in futures)
    supervised.wait_for_report("denoising is ready again")
    assert server.infer(prompt=PROMPT, num_inference_steps=1) is not None
    assert not any(is_alive(rank.pid) for rank in ranks)
    # What Triton keeps for each of the eight for ever, it keeps for a process that takes no requests any more.
    supervised.wait_for_report("diffusion was replaced")
    wait_until(lambda: not is_alive(chain))
    assert server.infer(prompt=PROMPT, num_inference_steps=1) is not None
    assert not any("tritonserver" in line for line in supervised.reports)


def test_processes_that_hang_are_killed_and_their_models_loaded_anew(supervised: Supervised) -> None:
    server = supervised.server
    stage, chain = supervised.stub("denoising"), supervised.stub("diffusion_stream")
    del supervised.reports[:]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(server.infer, prompt=PROMPT, num_inference_steps=200, num_outputs=4)
        wait_until(lambda: server.metric("running_requests", "denoising") == 1)
        os.kill(stage, signal.SIGSTOP)
        os.kill(chain, signal.SIGSTOP)
        assert unavailable(future.exception(60))
    for model, pid in (("denoising", stage), ("diffusion_stream", chain)):
        supervised.wait_for_report(f"{model} (pid {pid}) lives, but has given no sign of life")
        supervised.wait_for_report(f"{model} is ready again")
        assert not is_alive(pid)
    assert server.infer(prompt=PROMPT, num_inference_steps=1) is not None
    assert not any("tritonserver" in line for line in supervised.reports)


def test_an_idle_chain_that_died_is_loaded_anew(supervised: Supervised) -> None:
    del supervised.reports[:]
    os.kill(supervised.stub("diffusion_stream"), signal.SIGKILL)
    supervised.wait_for_report("diffusion_stream is ready again")
    assert supervised.server.infer(prompt=PROMPT, num_inference_steps=1) is not None


def test_callers_of_a_chain_that_died_are_told_by_a_new_start_of_the_server(supervised: Supervised) -> None:
    """Our own clients ask again by themselves, and a stream says that it was started anew."""
    server = supervised.server
    grpc_client = DiffusionClient(server.grpc_url)
    http_client = DiffusionClient(server.http_url, "http")
    with grpc_client, http_client, ThreadPoolExecutor(3) as pool:
        future = pool.submit(server.infer, prompt=PROMPT, num_inference_steps=200)
        generated = pool.submit(grpc_client.generate, PROMPT, num_inference_steps=200)
        streamed = pool.submit(
            lambda: list(http_client.stream(PROMPT, num_inference_steps=200, seed=1, num_images_per_prompt=8))
        )
        wait_until(lambda: server.metric("running_requests", "denoising") == 3)
        os.kill(supervised.stub("diffusion"), signal.SIGKILL)
        assert unavailable(future.exception(60))
        assert len(generated.result(180).images) == 1
        events = streamed.result(180)
        assert isinstance(events[-1], GenerationResult)
        restarts = [event.restarts for event in events if isinstance(event, Progress)]
        assert restarts[0] == 0
        assert restarts[-1] >= 1
    supervised.wait_for_report("diffusion died with requests in it")
    supervised.wait_for_report("tritonserver is ready again")
    assert server.infer(prompt=PROMPT, num_inference_steps=1) is not None


def test_health_tells_of_every_stage(supervised: Supervised) -> None:
    with tritonclient.grpc.InferenceServerClient(supervised.server.grpc_url) as client:
        answer = client.infer("health", [])
    assert answer.as_numpy("ready").item() is True
    assert b'"denoising": {"ready": true, "ready_replicas": 1' in answer.as_numpy("health").item()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/diffusion/unload"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("GET", "/v2/logging"),
        ("GET", "/v2/trace/setting"),
    ],
)
def test_what_is_for_the_operator_wants_the_key(supervised: Supervised, method: str, path: str) -> None:
    request = urllib.request.Request(f"http://{supervised.server.http_url}{path}", method=method)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=10)


def test_admitted_requests_are_finished_and_others_refused_when_the_server_is_told_to_end(tmp_path: Path) -> None:
    with own_server(tmp_path, QUICKLY_LOADED) as server, ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(server.infer, prompt=PROMPT, num_inference_steps=100, num_outputs=4) for _ in range(3)]
        wait_until(lambda: server.metric("running_requests", "denoising") == 3)
        end = pool.submit(server.process.stop)
        wait_until(lambda: server.process.stop_requested.is_set())
        time.sleep(0.2)
        with pytest.raises(InferenceServerException, match="shutting down") as refusal:
            server.infer(prompt=PROMPT, num_inference_steps=1)
        assert unavailable(refusal.value)
        assert all(future.result(120) is not None for future in futures)
        assert end.result(120) == 0
