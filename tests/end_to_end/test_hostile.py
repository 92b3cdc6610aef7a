"""Wrong, damaged and malicious requests, as scripts/benchmark hostile sends them: the server stands them all."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from tests.end_to_end.conftest import RunningServer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.hostile.attack import attack, make_cases
from benchmarks.hostile.command import input_types
from benchmarks.hostile.wire import Connection

pytestmark = pytest.mark.end_to_end

SECRET = "a prompt that nobody shall read in a log"


def test_hostile_requests_are_answered_as_documented_and_good_ones_served_between_them(server: RunningServer) -> None:
    processes = _pids(server)
    outcome = attack(
        make_cases(500, 1, input_types()),
        lambda: Connection(server.http_url, server.grpc_url, server.process.pid),
        every=250,
    )
    assert not outcome.violations
    assert outcome.answers.total() == 500
    assert len({kind for kind, _ in outcome.answers}) > 12
    assert _pids(server) == processes


def test_a_prompt_is_not_logged(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    server.infer(prompt=SECRET, negative_prompt=SECRET, num_inference_steps=1)
    with pytest.raises(Exception, match="num_inference_steps=0"):
        server.infer(prompt=SECRET, num_inference_steps=0)
    assert server.log_file.stat().st_size
    assert SECRET not in server.log_file.read_text(errors="replace")


def _pids(server: RunningServer) -> set[int]:
    return {process.pid for process in psutil.Process(server.process.pid).children(recursive=True)}
