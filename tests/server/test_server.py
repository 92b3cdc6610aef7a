"""TritonServer with the real tritonserver and a trivial model: its promises about start, end and clean-up."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.http
from tests.server.conftest import CONFIG
from tritonclient.utils import InferenceServerException

from triton_diffusion import server as server_module
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.runtime.stub_processes import find_stubs
from triton_diffusion.server import StartProgress, TritonServer, choose_ports

pytestmark = pytest.mark.end_to_end

# The models below are complete; without completion of their configuration a start takes half as long.
FAST = ("--disable-auto-complete-config",)
LAUNCHER = Path(__file__).resolve().parents[2] / "scripts" / "launch_triton_server.py"


def infer(address: str, value: bytes) -> bytes:
    with tritonclient.http.InferenceServerClient(address) as client:
        tensor = tritonclient.http.InferInput("x", [len(value)], "UINT8")
        tensor.set_data_from_numpy(np.frombuffer(value, np.uint8))
        return client.infer("identity", [tensor]).as_numpy("x").tobytes()


def test_a_server_starts_serves_and_leaves_nothing_behind(tmp_path, temporary_folder, write_model, leftovers) -> None:
    seen: list[StartProgress] = []
    with TritonServer(write_model("time.sleep(0.3)"), log_file=tmp_path / "log", extra_arguments=FAST) as server:
        assert not server.is_ready()
        server.wait_until_ready(timeout_s=60, on_progress=seen.append)
        assert infer(server.http_address, b"abc") == b"abc"
        assert leftovers(server.pid, os.getpid()), "the check itself must see a live server"
    assert server.wait() == 0
    assert leftovers(server.pid, os.getpid()) == []
    assert list(temporary_folder.iterdir()) == []
    assert seen
    assert seen[-1].elapsed_s > seen[0].elapsed_s
    assert "successfully loaded 'identity'" in (tmp_path / "log").read_text()


def test_it_listens_on_loopback_only(tmp_path, write_model) -> None:
    with TritonServer(write_model(), log_file=tmp_path / "log", extra_arguments=FAST) as server:
        server.wait_until_ready(timeout_s=60)
        ports = {server.http_port, server.grpc_port, server.metrics_port}
        # The page of metrics opens last, after the server is ready.
        deadline_s = time.monotonic() + 10
        listening: set[tuple[str, int]] = set()
        while {port for _, port in listening} != ports and time.monotonic() < deadline_s:
            listening = {(address, port) for address, port in _listening_sockets() if port in ports}
        server.kill()
    assert listening == {("127.0.0.1", port) for port in ports}


def _listening_sockets() -> list[tuple[str, int]]:
    found = []
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            local, _remote, state = line.split()[1:4]
            address, _, port = local.partition(":")
            if state == "0A":
                # 127.0.0.1, of its own or as an IPv6 address.
                address = "127.0.0.1" if address.endswith("0100007F") else address
                found.append((address, int(port, 16)))
    return found


@pytest.mark.parametrize(("given", "expected"), [(None, "2"), ("7", "7")])
def test_malloc_has_few_arenas_unless_the_operator_says_otherwise(
    tmp_path, write_model, monkeypatch, given, expected
) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if given:
        monkeypatch.setenv("MALLOC_ARENA_MAX", given)
    with TritonServer(write_model(), log_file=tmp_path / "log", extra_arguments=FAST) as server:
        server.wait_until_ready(timeout_s=60)
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children()]
        assert len(processes) > 1
        assert {process.environ()["MALLOC_ARENA_MAX"] for process in processes} == {expected}
        server.kill()


def test_a_model_that_fails_to_load_is_named_with_its_reason(tmp_path, write_model, leftovers) -> None:
    model_repository = write_model("raise RuntimeError('the checkpoint is broken')")
    server = TritonServer(model_repository, log_file=tmp_path / "log", extra_arguments=FAST)
    with (
        server,
        pytest.raises(ConfigurationError, match=r"identity: RuntimeError: the checkpoint is broken$"),
    ):
        server.wait_until_ready(timeout_s=60)
    assert leftovers(server.pid, os.getpid()) == []


def test_models_named_by_the_operator_are_loaded_alone_and_can_be_loaded_anew(tmp_path, write_model) -> None:
    folder = write_model("raise RuntimeError('not to be loaded')")
    (folder / "identity").rename(folder / "other")
    (folder / "other" / "config.pbtxt").write_text(CONFIG.replace("identity", "other"))
    write_model()
    with TritonServer(folder, log_file=tmp_path / "log", extra_arguments=[*FAST, "--load-model", "identity"]) as server:
        server.wait_until_ready(timeout_s=60)
        server.admin().unload("identity")
        server.admin().load("identity", timeout_s=60)
        assert server.admin().state("identity") == "READY"
        assert infer(server.http_address, b"abc") == b"abc"


def test_apis_that_the_operator_closes_do_not_open_those_that_serve_closes(tmp_path, write_model) -> None:
    closed = ["--http-restricted-api", "statistics,trace:mine=x", "--grpc-restricted-protocol=model-repository:mine=x"]
    asked = {
        "/v2/models/stats": "GET",
        "/v2/trace/setting": "GET",
        "/v2/logging": "GET",
        "/v2/repository/index": "POST",
    }
    with TritonServer(
        write_model(), log_file=tmp_path / "log", admin_key="sesame", extra_arguments=[*FAST, *closed]
    ) as server:
        server.wait_until_ready(timeout_s=60)

        def opened_by(headers: dict[str, str]) -> set[str]:
            return {path for path, method in asked.items() if status_of(server, method, path, headers) == 200}

        assert opened_by({}) == set()
        assert opened_by({"mine": "x"}) == {"/v2/models/stats", "/v2/trace/setting"}
        assert opened_by({"triton-diffusion-admin-key": "sesame"}) == {"/v2/logging", "/v2/repository/index"}


def status_of(server: TritonServer, method: str, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(server.http_address)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        return connection.getresponse().status


def test_a_wrong_argument_is_reported_without_the_help_that_the_server_prints(tmp_path, write_model) -> None:
    server = TritonServer(write_model(), log_file=tmp_path / "log", extra_arguments=["--no-such-flag"])
    with server, pytest.raises(ConfigurationError, match=r"unrecognized option '--no-such-flag'$"):
        server.wait_until_ready(timeout_s=60)


def test_a_slow_start_is_given_up_at_the_timeout(tmp_path, write_model, leftovers) -> None:
    server = TritonServer(write_model("time.sleep(60)"), log_file=tmp_path / "log", extra_arguments=FAST)
    with server, pytest.raises(ConfigurationError, match=r"not ready within 1 s; loaded so far: no model"):
        server.wait_until_ready(timeout_s=1)
    assert leftovers(server.pid, os.getpid()) == []


def test_a_server_that_is_killed_takes_its_models_and_memory_with_it(tmp_path, write_model, leftovers) -> None:
    with TritonServer(write_model(), log_file=tmp_path / "log", extra_arguments=FAST) as server:
        server.wait_until_ready(timeout_s=60)
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait(timeout_s=15) == -signal.SIGKILL
        assert leftovers(server.pid, os.getpid()) == []


def test_a_process_that_a_model_forgot_ends_with_the_server(tmp_path, write_model, leftovers) -> None:
    model_repository = write_model("import subprocess; subprocess.Popen(['sleep', '300'])")
    with TritonServer(model_repository, log_file=tmp_path / "log", extra_arguments=FAST) as server:
        server.wait_until_ready(timeout_s=60)
    assert server.wait() == 0
    assert leftovers(server.pid, os.getpid()) == []


def test_stop_kills_after_the_grace_period(tmp_path, write_model, leftovers) -> None:
    with TritonServer(
        write_model(execute="time.sleep(120)"), log_file=tmp_path / "log", extra_arguments=FAST
    ) as server:
        server.wait_until_ready(timeout_s=60)
        caller = threading.Thread(target=_ignoring_errors, args=(server.http_address,))
        caller.start()
        time.sleep(0.5)
        started = time.monotonic()
        assert server.stop(grace_s=1.0) == -signal.SIGKILL
        assert time.monotonic() - started < 10
    caller.join(timeout=10)
    assert leftovers(server.pid, os.getpid()) == []


def _ignoring_errors(address: str) -> None:
    try:
        infer(address, b"x")
    except Exception:
        return


def test_a_port_that_was_taken_meanwhile_is_chosen_anew(tmp_path, write_model, monkeypatch) -> None:
    choices: list[tuple[int, int, int]] = []

    def choose(*arguments: Any) -> tuple[int, int, int]:
        http_port, grpc_port, metrics_port = choose_ports(*arguments)
        choices.append((http_port if choices else blocked, grpc_port, metrics_port))
        return choices[-1]

    monkeypatch.setattr(server_module, "choose_ports", choose)
    with (
        other_server() as blocked,
        TritonServer(write_model(), log_file=tmp_path / "log", extra_arguments=FAST) as server,
    ):
        server.wait_until_ready(timeout_s=60)
        assert infer(server.http_address, b"abc") == b"abc"
        assert len(choices) == 2
        server.kill()


@contextlib.contextmanager
def other_server() -> Iterator[int]:
    """The port of a server that says it is ready, as another Triton would."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"name": "triton"}')

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_stop_before_the_start_is_not_forgotten(tmp_path, write_model) -> None:
    """A signal may come between the installation of its handler and the start of the process."""
    server = TritonServer(write_model(), log_file=tmp_path / "log", extra_arguments=FAST)
    server.terminate()
    with server, pytest.raises(ConfigurationError, match="was stopped before it was ready"):
        server.wait_until_ready(timeout_s=60)
    assert server.wait() == -signal.SIGKILL


def test_a_given_port_in_use_is_refused_before_the_start(write_model) -> None:
    with socket.create_server(("127.0.0.1", 0)) as blocker:
        port = blocker.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"--grpc-port={port} is in use on 127\.0\.0\.1"):
            TritonServer(write_model(), grpc_port=port).start()


def test_one_port_cannot_serve_two_protocols() -> None:
    with pytest.raises(ConfigurationError, match="port 20001 is given twice"):
        choose_ports("127.0.0.1", 20001, 20001, None)


def test_chosen_ports_are_free_and_differ() -> None:
    with socket.create_server(("127.0.0.1", 0)) as blocker:
        ports = choose_ports("127.0.0.1", None, None, None)
        assert len(set(ports)) == 3
        assert blocker.getsockname()[1] not in ports
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_an_executable_that_does_not_exist_is_refused(write_model) -> None:
    with pytest.raises(ConfigurationError, match=r"tritonserver='/no/such/server' is not an executable file"):
        TritonServer(write_model(), executable="/no/such/server")


def launch(model_repository: Path, *more: str) -> subprocess.Popen[str]:
    http_port, grpc_port, metrics_port = choose_ports("127.0.0.1", None, None, None)
    flags = {
        "--model-repository": model_repository,
        "--port": http_port,
        "--grpc-port": grpc_port,
        "--metrics-port": metrics_port,
        "--log-file": model_repository.parent / "log",
    }
    arguments = [str(item) for pair in flags.items() for item in pair]
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER), *arguments, *more, "--", *FAST], stdout=subprocess.PIPE, text=True
    )


def server_pid_of(launcher: subprocess.Popen[str]) -> int:
    """The launcher's child that runs tritonserver; the other one is its guard."""
    children = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    return next(int(pid) for pid in pids if b"--model-repository" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.fixture
def launched(write_model):
    """The launcher's process and the server's pid, when the server is ready."""
    launcher = launch(write_model())
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "ready\n"
    yield launcher, server_pid_of(launcher)
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_forwards_signals_and_returns_the_exit_code(
    number, launched, leftovers, tmp_path, temporary_folder
) -> None:
    launcher, server_pid = launched
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) == 0
    assert "Signal (15) received" in (tmp_path / "log").read_text()
    assert leftovers(server_pid, launcher.pid) == []
    assert list(temporary_folder.iterdir()) == []


def test_a_killed_launcher_leaves_nothing(launched, leftovers, eventually, temporary_folder) -> None:
    launcher, server_pid = launched
    assert leftovers(server_pid, launcher.pid)
    launcher.kill()
    eventually(lambda: leftovers(server_pid, launcher.pid) == [])
    eventually(lambda: list(temporary_folder.iterdir()) == [])


def test_a_killed_owner_leaves_nothing_even_if_the_server_hangs_on_its_way_out(
    tmp_path, write_model, leftovers, eventually
) -> None:
    """With PR_SET_PDEATHSIG alone, a server whose model did not end outlived its owner by minutes."""
    owner = launch(write_model(finalize="time.sleep(100)"), "--exit-timeout-s", "1")
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == "ready\n"
        server_pid = server_pid_of(owner)
        owner.kill()
        owner.wait()
    eventually(lambda: leftovers(server_pid, owner.pid) == [])


def test_a_server_that_dies_is_started_again_on_the_same_ports(launched, leftovers, eventually, tmp_path) -> None:
    launcher, server_pid = launched
    command = Path(f"/proc/{server_pid}/cmdline").read_bytes().split(b"\0")
    (port,) = [int(part.partition(b"=")[2]) for part in command if part.startswith(b"--http-port=")]
    os.kill(server_pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{server_pid}").exists() and answers(f"127.0.0.1:{port}"), timeout_s=60)
    assert server_pid_of(launcher) != server_pid
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=30) == 0
    assert leftovers(server_pid, launcher.pid) == []


def test_a_model_whose_process_dies_is_loaded_anew(launched, eventually) -> None:
    """Triton goes on to say that it is ready, and lets every request fail."""
    launcher, server_pid = launched
    command = Path(f"/proc/{server_pid}/cmdline").read_bytes().split(b"\0")
    (port,) = [int(part.partition(b"=")[2]) for part in command if part.startswith(b"--http-port=")]
    ((stub, model),) = find_stubs(server_pid).items()
    assert model == "identity"
    os.kill(stub, signal.SIGKILL)
    eventually(lambda: stub not in find_stubs(server_pid) and answers(f"127.0.0.1:{port}"), timeout_s=60)
    assert server_pid_of(launcher) == server_pid


def answers(address: str) -> bool:
    try:
        return infer(address, b"abc") == b"abc"
    except (OSError, InferenceServerException):
        return False


def test_a_server_that_dies_again_and_again_is_given_up_with_its_signal(write_model, tmp_path) -> None:
    launcher = launch(write_model(), "--max-restarts", "0")
    assert launcher.stdout is not None
    with launcher.stdout:
        assert launcher.stdout.readline() == "ready\n"
        os.kill(server_pid_of(launcher), signal.SIGKILL)
        assert launcher.wait(timeout=20) == 128 + signal.SIGKILL


def test_a_signal_during_the_start_ends_it_at_once(write_model, tmp_path, leftovers, eventually) -> None:
    launcher = launch(write_model("time.sleep(60)"))
    log = tmp_path / "log"
    eventually(lambda: log.exists() and "TRITONBACKEND_ModelInstanceInitialize" in log.read_text())
    server_pid = server_pid_of(launcher)
    started = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert launcher.returncode == 0
    assert "ready" not in output
    assert leftovers(server_pid, launcher.pid) == []
