"""`client.health()` and `triton-diffusion health`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.client.conftest import TritonDouble

from triton_diffusion_client import AsyncDiffusionClient, DiffusionClient, ServerError, ServerUnavailableError, cli

READY = {"ready": True, "ready_replicas": 2, "num_replicas": 2, "restarts_total": 0, "reason": ""}
LOOPING = {
    "ready": False,
    "ready_replicas": 0,
    "num_replicas": 2,
    "restarts_total": 7,
    "reason": "5 restarts in 60 s; the next one in 16 s",
}


@pytest.fixture(params=["grpc", "http"])
def server(request: pytest.FixtureRequest, triton: TritonDouble) -> tuple[str, Any]:
    return (triton.grpc_url if request.param == "grpc" else triton.http_url), request.param


def test_health_tells_each_stage(triton: TritonDouble, server: tuple[str, Any]) -> None:
    triton.health = {"ready": False, "stages": {"decoding": READY, "denoising": LOOPING}}
    with DiffusionClient(*server) as client:
        health = client.health()
    assert not health.ready
    assert health.stages["decoding"].ready
    assert (health.stages["denoising"].restarts_total, health.stages["denoising"].num_replicas) == (7, 2)
    assert health.stages["denoising"].reason.startswith("5 restarts")

    async def ask() -> Any:
        async with AsyncDiffusionClient(*server, model="wan") as client:
            return await client.health()

    assert asyncio.run(ask()) == health
    assert [request.model for request in triton.received] == ["health", "wan_health"]


def test_the_command_returns_0_when_ready_and_1_when_not(
    triton: TritonDouble, server: tuple[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["health", "--url", server[0], "--protocol", server[1]]
    triton.health = {"ready": True, "stages": {"denoising": READY}}
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == "ready\n  denoising  ready, 2 of 2 replicas, 0 restarts\n"
    triton.health = {"ready": False, "stages": {"decoding": READY, "denoising": LOOPING}}
    assert cli.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "not ready"
    assert lines[2] == f"  denoising  not ready, 0 of 2 replicas, 7 restarts: {LOOPING['reason']}"
    assert cli.main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == triton.health


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_cannot_be_reached_is_not_ready_at_once(
    protocol: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["health", "--url", "127.0.0.1:1", "--protocol", protocol]) == 1
    assert capsys.readouterr().err.startswith("error: cannot reach a server at 127.0.0.1:1")
    with DiffusionClient("127.0.0.1:1", protocol) as client, pytest.raises(ServerUnavailableError):
        client.health()


@pytest.mark.parametrize(
    "answer", [None, [], "ready", {}, {"ready": True}, {"ready": True, "stages": {"denoising": 1}}]
)
def test_an_answer_of_another_kind_is_an_error(triton: TritonDouble, server: tuple[str, Any], answer: Any) -> None:
    triton.health = answer
    with DiffusionClient(*server) as client, pytest.raises(ServerError, match="not one of triton-diffusion"):
        client.health()


def test_what_a_server_says_does_not_control_the_terminal(
    triton: TritonDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.health = {"ready": True, "stages": {"\x1b[2Jdenoising": READY | {"reason": "\x1b]0;title\x07"}}}
    assert cli.main(["health", "--url", triton.grpc_url]) == 0
    printed = capsys.readouterr().out
    assert "denoising" in printed
    assert "\x1b" not in printed
    assert "\x07" not in printed
