"""One real tritonserver for all end-to-end tests: the demo checkpoint, in float32 so that pictures can be compared."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http

from triton_diffusion.repository import build_repository
from triton_diffusion.runtime.rank_main import SPARE_NAME
from triton_diffusion.runtime.work import STAGE_MODELS
from triton_diffusion.server import TritonServer

STAGES = ("text_encoding", "denoising", "decoding")
"""Those that a request without pictures goes through."""

_DTYPES = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "UINT8": np.uint8}
INPUT_TYPES = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "height": "INT32",
    "width": "INT32",
    "num_inference_steps": "INT32",
    "guidance_scale": "FP32",
    "guidance_scale_2": "FP32",
    "embedded_guidance_scale": "FP32",
    "seed": "INT64",
    "num_outputs": "INT32",
    "max_sequence_length": "INT32",
    "output_format": "BYTES",
    "output_quality": "INT32",
    "preview_interval": "INT32",
    "priority": "INT32",
    "deadline_s": "FP32",
    "deadline_action": "BYTES",
    "request_id": "BYTES",
}


@dataclass
class RunningServer:
    """Addresses of a server, and what a test needs to look into it."""

    process: TritonServer
    http_url: str
    grpc_url: str
    log_file: Path

    def ranks(self, stage_model: str | None = None) -> list[psutil.Process]:
        """The rank processes of a stage model, or of all, by the Triton stub that is their parent."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "triton_diffusion.runtime.rank_main" in process.cmdline() and process.name() != SPARE_NAME:
                stub = " ".join(process.parent().cmdline())
                if stage_model is None or f"/{stage_model}/" in stub:
                    found.append(process)
        return found

    def metric(self, name: str, stage_model: str) -> float:
        """A number of ours on the metrics page, which is at most a second old."""
        with urllib.request.urlopen(self.process.metrics_url, timeout=10) as response:
            page = response.read().decode()
        (line,) = [line for line in page.splitlines() if line.startswith(f'diffusion_{name}{{model="{stage_model}"')]
        return float(line.rsplit(" ", 1)[1])

    def wait_for_metric(self, name: str, stage_model: str, value: float, timeout_s: float = 10.0) -> None:
        """Return when a number of ours is `value`: it gets there a second late, or more on a busy machine."""
        deadline_s = time.monotonic() + timeout_s
        while (found := self.metric(name, stage_model)) != value:
            assert time.monotonic() < deadline_s, f"{name} of {stage_model} is {found}, not {value}"
            time.sleep(0.1)

    def wait_until_running(self, stage_model: str, timeout_s: float = 10.0) -> None:
        """Return when the ranks of a stage have at least one request in their hands."""
        deadline_s = time.monotonic() + timeout_s
        while not self.metric("running_requests", stage_model):
            assert time.monotonic() < deadline_s, f"no request runs in {stage_model}"
            time.sleep(0.1)

    def wait_until_idle(self, timeout_s: float = 20.0) -> None:
        """Return when no stage has a request any more."""
        deadline_s = time.monotonic() + timeout_s
        while any(self.metric(name, stage) for stage in STAGES for name in ("queue_depth", "running_requests")):
            assert time.monotonic() < deadline_s, "a stage still has requests"
            time.sleep(0.1)

    def infer(
        self,
        *,
        protocol: str = "grpc",
        model: str = "diffusion",
        parameters: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> Any:
        """One request through tritonclient; returns its InferResult."""
        module = tritonclient.grpc if protocol == "grpc" else tritonclient.http
        url = self.grpc_url if protocol == "grpc" else self.http_url
        with module.InferenceServerClient(url, **({} if protocol == "grpc" else {"network_timeout": 120.0})) as client:
            tensors = [tensor(module, name, value) for name, value in inputs.items()]
            return client.infer(model, tensors, parameters=parameters)


def tensor(module: Any, name: str, value: Any, datatype: str | None = None) -> Any:
    """An InferInput of shape [1], or of the array's shape and type if `value` is an array."""
    if isinstance(value, np.ndarray):
        array = value
        datatype = datatype or next(key for key, dtype in _DTYPES.items() if dtype == value.dtype.type)
    else:
        datatype = datatype or INPUT_TYPES[name]
        array = np.array([value.encode() if isinstance(value, str) else value], dtype=_DTYPES[datatype])
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that all tests share; a test that breaks it must leave it as it was."""
    folder = tmp_path_factory.mktemp("server")
    settings = {"dtype": "float32", "max_num_inference_steps": "200", "max_concurrent_requests": "256", "num_gpus": "0"}
    with own_server(folder, settings, stages=STAGE_MODELS) as running:
        yield running


@contextmanager
def own_server(
    folder: Path,
    settings: dict[str, str],
    *,
    stages: Sequence[str] = STAGES,
    response_cache: bool = False,
    **options: Any,
) -> Iterator[RunningServer]:
    """A server of its own with certain parameters; on the way out nothing of it may be left."""
    # Spares and further replicas would take the cores from the tests as they start; those of tests/runtime look at
    # spares, and the server that most tests share has as many replicas as it chooses.
    settings = {"spare_ranks": "false", "num_gpus": "1"} | settings
    repository = build_repository(folder / "models", settings, stages=stages, response_cache=response_cache)
    before = shared_memory()
    with TritonServer(repository, log_file=folder / "server.log", exit_timeout_s=20, **options) as process:
        process.wait_until_ready(180)
        pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        yield RunningServer(process, process.http_address, process.grpc_address, folder / "server.log")
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert not shared_memory() - before


def shared_memory() -> set[Path]:
    """Segments in /dev/shm of the servers that this process started."""
    return set(Path("/dev/shm").glob(f"triton_diffusion_{os.getpid()}_*"))
