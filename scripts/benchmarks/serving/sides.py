"""The sides that are compared: started, asked and ended."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiohttp
from tritonclient.grpc.aio import InferenceServerClient

from benchmarks.running import running_server
from benchmarks.serving.clients import ask_http, ask_monolith, ask_ours
from benchmarks.serving.load import Ask
from benchmarks.serving.processes import http_server, resume, suspend
from benchmarks.variables import environment
from triton_diffusion.server import TritonServer
from triton_diffusion_client import AsyncDiffusionClient

BASELINES = ("monolith", "fastapi", "litserve")
_MONOLITH = Path(__file__).resolve().parent.parent / "baselines" / "monolith"
_HTTP_MODULES = {
    "fastapi": "benchmarks.baselines.fastapi_lock",
    "litserve": "benchmarks.baselines.litserve_batching",
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to serve the pipeline."""

    name: str
    pid: int
    """The process that is above all others of this side."""
    ask: Ask

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The side's turn; outside it its processes are stopped."""
        resume(self.pid)
        try:
            yield
        finally:
            suspend(self.pid)


@dataclass(frozen=True, kw_only=True)
class Ours(Side):
    """The server of this project."""

    server: TritonServer
    client: AsyncDiffusionClient


@contextlib.contextmanager
def open_ours(settings: Mapping[str, str], runner: asyncio.Runner) -> Iterator[Ours]:
    """Start the server for a model repository with these settings."""
    with running_server(settings) as server:
        client = AsyncDiffusionClient(server.grpc_address)
        ask = partial(ask_ours, client)
        try:
            yield Ours(name="ours", pid=server.pid, ask=ask, server=server, client=client)
        finally:
            resume(server.pid)
            runner.run(client.close())


@contextlib.contextmanager
def open_baseline(name: str, variables: Mapping[str, str], runner: asyncio.Runner) -> Iterator[Side]:
    """Start "monolith", "fastapi" or "litserve", with these variables in its environment."""
    opened = _open_monolith(variables, runner) if name == "monolith" else _open_http(name, variables, runner)
    with opened as side:
        try:
            yield side
        finally:
            resume(side.pid)


@contextlib.contextmanager
def _open_monolith(variables: Mapping[str, str], runner: asyncio.Runner) -> Iterator[Side]:
    with tempfile.TemporaryDirectory(prefix="triton-diffusion-models-") as folder:
        version = Path(folder, "monolith", "1")
        version.mkdir(parents=True)
        shutil.copy(_MONOLITH / "config.pbtxt", version.parent)
        shutil.copy(_MONOLITH / "model.py", version)
        server = TritonServer(
            folder,
            log_file=Path("outputs") / "benchmark_monolith.log",
            exit_timeout_s=30,
            extra_arguments=["--disable-auto-complete-config"],
            temporary_folders=[folder],
        )
        with contextlib.ExitStack() as stack:
            with environment(variables):
                stack.enter_context(server)
                server.wait_until_ready()
            client = runner.run(_make_monolith_client(server.grpc_address))
            stack.callback(lambda: runner.run(client.close()))
            yield Side(name="monolith", pid=server.pid, ask=partial(ask_monolith, client))


@contextlib.contextmanager
def _open_http(name: str, variables: Mapping[str, str], runner: asyncio.Runner) -> Iterator[Side]:
    if name == "litserve":
        # Its worker is a child of a process that has imported torch: bound to a core there, it would have no other.
        variables = {key: value for key, value in variables.items() if key not in ("OMP_PROC_BIND", "OMP_PLACES")}
    with http_server(_HTTP_MODULES[name], variables) as (pid, address):
        session = runner.run(_make_session())
        try:
            yield Side(name=name, pid=pid, ask=partial(ask_http, session, f"{address}/predict"))
        finally:
            runner.run(session.close())


async def _make_monolith_client(address: str) -> InferenceServerClient:
    """Made inside the event loop to which it then belongs."""
    return InferenceServerClient(address)


async def _make_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3600),
        timeout=aiohttp.ClientTimeout(total=None),
    )
