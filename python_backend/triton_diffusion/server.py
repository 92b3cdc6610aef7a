"""Start tritonserver, wait until it serves, and leave nothing behind when it ends.

`TritonServer` owns one server process, the processes of its models, its shared memory and its temporary
folder. All of these are gone when it ends, in whatever way: by `stop`, by a signal, by a crash of the server,
or with our own process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from triton_diffusion import _server_guard
from triton_diffusion._installation import TritonInstallation, find_triton
from triton_diffusion.config import ChainConfig
from triton_diffusion.errors import ConfigurationError

_SHARED_MEMORY = Path("/dev/shm")
_PORT_IS_TAKEN = re.compile(r"already in use|address in use|failed to start \w+ service", re.IGNORECASE)
_MODEL_IS_LOADED = re.compile(r"successfully loaded '([^']+)'")
_MODEL_FAILED = re.compile(r"failed to load '([^']+)' version \d+: (.+?)\"?$")

# What the server says of its own start, apart from the models; after a wrong argument it prints all its help.
_COMPLAINT = re.compile(r"unrecognized option|^Bad option|^invalid |^error: |failed to start", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class StartProgress:
    """How far a start has come."""

    elapsed_s: float
    loaded_models: tuple[str, ...]
    """Names, in the order in which the models became ready."""


class TritonServer:
    """One tritonserver on this machine; a context manager that starts it and stops it."""

    def __init__(
        self,
        model_repository: str | Path,
        *,
        host: str = "127.0.0.1",
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        executable: str | Path | None = None,
        log_file: str | Path | None = None,
        exit_timeout_s: int = 300,
        thread_pool_size: int = 2 * ChainConfig.max_concurrent_requests + 16,
        response_cache_bytes: int = 0,
        extra_arguments: Sequence[str] = (),
        temporary_folders: Sequence[str | Path] = (),
    ) -> None:
        """Prepare a server for the models in `model_repository`; nothing is started yet.

        A port that is None is chosen among the free ones. The server's log goes to `log_file`, else to our
        stderr. On its way out the server waits up to `exit_timeout_s` for the requests under way.
        `thread_pool_size` is how many calls from one model instance to other models may be under way at once.
        `response_cache_bytes` is the size of Triton's response cache for the models that use it; 0 for none.
        `temporary_folders` are the caller's to remove; should our process die without a chance to, they are
        removed all the same. Raises ConfigurationError without a tritonserver.
        """
        self._model_repository = Path(model_repository)
        self._host = host
        self._given_ports = (http_port, grpc_port, metrics_port)
        self._ports = (0, 0, 0)
        self._installation: TritonInstallation = find_triton(executable)
        self._log_file = Path(log_file) if log_file else None
        self._exit_timeout_s = exit_timeout_s
        self._thread_pool_size = thread_pool_size
        self._response_cache_bytes = response_cache_bytes
        self._extra_arguments = tuple(extra_arguments)
        self._temporary_folders = [Path(folder) for folder in temporary_folders]
        self._run: _ServerRun | None = None
        self._id = f"triton-diffusion-{secrets.token_hex(4)}"
        self._is_stopping = False

    # ---------------------------------------------------------------- addresses

    @property
    def http_port(self) -> int:
        """The port of HTTP."""
        return self._ports[0]

    @property
    def grpc_port(self) -> int:
        """The port of gRPC."""
        return self._ports[1]

    @property
    def metrics_port(self) -> int:
        """The port of the Prometheus metrics."""
        return self._ports[2]

    @property
    def http_address(self) -> str:
        """`host:port` of HTTP, as a client on this machine reaches it."""
        return _address(_reachable_host(self._host), self.http_port)

    @property
    def grpc_address(self) -> str:
        """`host:port` of gRPC, as a client on this machine reaches it."""
        return _address(_reachable_host(self._host), self.grpc_port)

    @property
    def metrics_url(self) -> str:
        """The page of the metrics, as a client on this machine reaches it."""
        return f"http://{_address(_reachable_host(self._host), self.metrics_port)}/metrics"

    # ---------------------------------------------------------------- life

    def start(self) -> None:
        """Start the process; returns at once. Raises ConfigurationError if a given port is taken."""
        if self._run is not None:
            raise RuntimeError("this TritonServer was started already")
        if not self._model_repository.is_dir():
            raise ConfigurationError(f"model_repository={str(self._model_repository)!r} is not a folder")
        self._start_process()

    def wait_until_ready(
        self, timeout_s: float = 1800.0, on_progress: Callable[[StartProgress], None] | None = None
    ) -> None:
        """Return when all models serve; `on_progress` is called about twice a second until then.

        Raises ConfigurationError, with the reason from the server's log, as soon as the server gives up, and
        after `timeout_s`. Ports that we chose and another process took meanwhile are chosen anew.
        """
        started = time.monotonic()
        attempts_left = 3
        while True:
            run = self._started()
            elapsed_s = time.monotonic() - started
            if run.has_ended.is_set():
                attempts_left -= 1
                if not (self._ports_were_taken(run) and attempts_left):
                    raise ConfigurationError(self._why_it_ended(run))
                self._start_process()
                continue
            is_ready = self.is_ready()
            if on_progress is not None:
                on_progress(StartProgress(elapsed_s=elapsed_s, loaded_models=tuple(run.log.loaded_models)))
            if is_ready:
                return
            if elapsed_s > timeout_s:
                raise ConfigurationError(
                    f"tritonserver was not ready within {timeout_s:g} s; loaded so far: "
                    f"{', '.join(run.log.loaded_models) or 'no model'}; allow more time or look at the log\n"
                    f"{run.log.tail()}"
                )
            run.has_ended.wait(0.1 if elapsed_s < 5 else 0.5)

    def is_ready(self) -> bool:
        """Whether the server answers that all its models serve."""
        connection = http.client.HTTPConnection(_reachable_host(self._host), self.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                return False
            # Another server may have taken the port, and ours be about to find that out.
            connection.request("GET", "/v2")
            name: object = json.load(connection.getresponse()).get("name")
            return name == self._id
        except (OSError, http.client.HTTPException, ValueError):
            return False
        finally:
            connection.close()

    @property
    def pid(self) -> int:
        """The process of the server, and the process group of all that belongs to it."""
        return self._started().pid

    def is_running(self) -> bool:
        """Whether the process runs."""
        return self._run is not None and not self._run.has_ended.is_set()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the process to end; its exit code (negative: the signal that ended it), or None at the timeout."""
        run = self._started()
        return run.exit_code if run.has_ended.wait(timeout_s) else None

    def terminate(self) -> None:
        """Ask the server to finish its requests and end; returns at once."""
        self._is_stopping = True
        if self._run is not None:
            self._run.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the server and all processes of its models now."""
        self._is_stopping = True
        if self._run is not None:
            self._run.kill_group()

    def stop(self, grace_s: float | None = None) -> int | None:
        """Terminate, and kill what is left after `grace_s` (default: a little more than the exit timeout).

        Returns the exit code, None if the server was never started. May be called again.
        """
        if self._run is None:
            return None
        self.terminate()
        if self.wait(self._exit_timeout_s + 15.0 if grace_s is None else grace_s) is None:
            self.kill()
        return self.wait()

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Within, SIGTERM and SIGINT end the server in order, and a second one ends it at once. For the main thread."""

        def forward(_signal_number: int, _frame: FrameType | None) -> None:
            if self._is_stopping:
                self.kill()
            self.terminate()

        previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether the end of the server is our doing."""
        return self._is_stopping

    def log_tail(self, num_lines: int = 20) -> str:
        """The last lines of the server's log."""
        return self._started().log.tail(num_lines)

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an error nobody waits for the requests under way.
        self.stop(grace_s=10.0 if error is not None else None)

    # ---------------------------------------------------------------- inside

    def _start_process(self) -> None:
        self._ports = choose_ports(self._host, *self._given_ports)
        self._run = _ServerRun(
            self._installation,
            self._arguments,
            self._log_file,
            guard_grace_s=min(self._exit_timeout_s, 15),
            temporary_folders=self._temporary_folders,
        )
        if self._is_stopping:  # asked to while there was no process yet
            self.kill()

    def _arguments(self, shm_prefix: str) -> list[str]:
        return [
            f"--id={self._id}",
            f"--model-repository={self._model_repository}",
            f"--http-address={self._host}",
            f"--http-port={self.http_port}",
            f"--grpc-address={self._host}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-address={self._host}",
            f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={self._exit_timeout_s}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            f"--backend-config=python,thread-pool-size={self._thread_pool_size}",
            *self._cache_arguments(),
            *self._extra_arguments,
        ]

    def _cache_arguments(self) -> list[str]:
        if not self._response_cache_bytes:
            return []
        return self._installation.response_cache_arguments(self._response_cache_bytes)

    def _started(self) -> _ServerRun:
        if self._run is None:
            raise RuntimeError("this TritonServer was not started")
        return self._run

    def _ports_were_taken(self, run: _ServerRun) -> bool:
        return not self._is_stopping and None in self._given_ports and bool(_PORT_IS_TAKEN.search(run.log.tail(200)))

    def _why_it_ended(self, run: _ServerRun) -> str:
        if self._is_stopping:
            return "tritonserver was stopped before it was ready"
        if run.log.failed_models:
            reasons = "\n".join(f"  {model}: {reason}" for model, reason in run.log.failed_models.items())
            return f"tritonserver could not load its models (more in its log)\n{reasons}"
        what = f"tritonserver ended before it was ready ({describe_exit(run.exit_code)})"
        if run.log.complaints:
            return f"{what}: {'; '.join(run.log.complaints)}"
        return f"{what}; the end of its log:\n{run.log.tail()}"


class _ServerRun:
    """One server process from its start to the clean-up after it, which a thread sees to."""

    def __init__(
        self,
        installation: TritonInstallation,
        arguments: Callable[[str], list[str]],
        log_file: Path | None,
        *,
        guard_grace_s: float,
        temporary_folders: Sequence[Path],
    ) -> None:
        self.has_ended = threading.Event()
        self.exit_code: int | None = None
        self.log = _Log(log_file)
        self._folder = Path(tempfile.mkdtemp(prefix="triton-diffusion-"))
        self._shared_memory = f"triton_diffusion_{os.getpid()}_{secrets.token_hex(4)}_"
        command = [
            str(installation.executable),
            *installation.prepare_backend_directory(self._folder / "backends"),
            *arguments(self._shared_memory),
        ]
        try:
            self._process = self._start_server(command, installation.environment())
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ConfigurationError(f"{installation.executable} could not be started: {error}") from error
        self._guard = self._start_guard(guard_grace_s, [self._folder, *temporary_folders])
        threading.Thread(target=self._wait_and_clean_up, name="tritonserver", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        if not self.has_ended.is_set():
            self._process.send_signal(number)

    def kill_group(self) -> None:
        if not self.has_ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _start_server(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A group of its own: Ctrl-C reaches only us, and killing the group ends the models' processes.
            process_group=0,
            # SIGPIPE stays ignored, as in all of Python: the server can end in order when we, who read its
            # log, are gone.
            restore_signals=False,
        )

    def _start_guard(self, grace_s: float, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
        arguments = [os.getpid(), self.pid, grace_s, _SHARED_MEMORY / self._shared_memory, *folders]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", _server_guard.__file__, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A signal for all of our group is not for the guard, which is needed afterwards.
            start_new_session=True,
        )

    def _wait_and_clean_up(self) -> None:
        assert self._process.stdout is not None
        reader = threading.Thread(target=self.log.read, args=(self._process.stdout,), daemon=True)
        reader.start()
        exit_code = self._process.wait()
        self._guard.kill()
        self._guard.wait()
        _end_group(self.pid)
        reader.join(timeout=5)
        if not reader.is_alive():
            self._process.stdout.close()
        self.log.close()
        for segment in _SHARED_MEMORY.glob(f"{self._shared_memory}*"):
            segment.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self.exit_code = exit_code
        self.has_ended.set()


class _Log:
    """The server's output: copied to a file or to stderr, and searched for what became of the models."""

    def __init__(self, file: Path | None) -> None:
        self.loaded_models: list[str] = []
        self.failed_models: dict[str, str] = {}
        self.complaints: list[str] = []
        self._lines: deque[str] = deque(maxlen=400)
        self._sink: IO[str] = sys.stderr
        self._owns_sink = file is not None
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._sink = file.open("a", encoding="utf-8")
            except OSError as error:
                raise ConfigurationError(f"log_file={str(file)!r} cannot be written: {error}") from error

    def read(self, stream: IO[str]) -> None:
        """Copy all lines. Whatever happens to the copy, read on: the server blocks when nobody does."""
        for line in stream:
            self._lines.append(line.rstrip("\n"))
            self._note(line.rstrip())
            with contextlib.suppress(OSError, ValueError):
                self._sink.write(line)
                self._sink.flush()

    def tail(self, num_lines: int = 20) -> str:
        return "\n".join(list(self._lines)[-num_lines:])

    def close(self) -> None:
        if self._owns_sink:
            self._sink.close()

    def _note(self, line: str) -> None:
        if loaded := _MODEL_IS_LOADED.search(line):
            self.loaded_models.append(loaded[1])
        elif _COMPLAINT.search(line):
            self.complaints.append(line)
        elif failed := _MODEL_FAILED.search(line):
            # The error itself; its traceback, which Triton writes as "\\n\\nAt:\\n ...", stays in the log.
            reason, _, _ = failed[2].partition("\\n\\nAt:")
            self.failed_models[failed[1]] = reason.removeprefix("Internal: ").replace("\\n", "\n    ")


def choose_ports(host: str, *given: int | None) -> tuple[int, int, int]:
    """The ports for HTTP, gRPC and metrics: the given ones, and free ones in place of None.

    Raises ConfigurationError if a given port is taken or given twice.
    """
    chosen: list[int] = []
    for port, flag in zip(given, ("--port", "--grpc-port", "--metrics-port"), strict=True):
        if port is None:
            port = _free_port(host, besides=[*chosen, *(other for other in given if other)])
        elif port in chosen:
            raise ConfigurationError(f"port {port} is given twice; HTTP, gRPC and metrics need one each")
        elif not _is_free(host, port):
            raise ConfigurationError(
                f"{flag}={port} is in use on {host}; stop what listens there, or choose another port"
            )
        chosen.append(port)
    http_port, grpc_port, metrics_port = chosen
    return http_port, grpc_port, metrics_port


def describe_exit(exit_code: int | None) -> str:
    """An exit code in words."""
    if exit_code is not None and exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _free_port(host: str, besides: Sequence[int]) -> int:
    # Below the range from which the kernel takes ports for outgoing connections, which come and go at any
    # time.
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
        if port not in besides and _is_free(host, port):
            return port
    raise ConfigurationError(
        f"no free port found on {host} between 20000 and 32000; give --port, --grpc-port, --metrics-port"
    )


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"{host}:{port} is not an address to listen on: {error}") from error
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _end_group(group: int, patience_s: float = 2.0, timeout_s: float = 10.0) -> None:
    """Wait until a process group whose leader has ended is gone; kill what is left of it after `patience_s`."""
    started = time.monotonic()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while (elapsed_s := time.monotonic() - started) < timeout_s:
            # Signal 0 only asks whether somebody is there: models may be at their own clean-up.
            os.killpg(group, signal.SIGKILL if elapsed_s > patience_s else 0)
            # In a container we are process 1, and the orphans of the server are ours to reap.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-group, os.WNOHANG)
            time.sleep(0.02)


def _reachable_host(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
