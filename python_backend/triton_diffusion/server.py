"""Start tritonserver, wait until it serves, and leave nothing behind when it ends.

`TritonServer` owns one server process, the processes of its models, its shared memory and its temporary
folder. All of these are gone when it ends, in whatever way: by `stop`, by a signal, by a crash of the server,
or with our own process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from triton_diffusion._admin import ServerAdmin, control_arguments, restriction_arguments
from triton_diffusion._installation import TritonInstallation, find_triton
from triton_diffusion._ports import choose_ports, join_address, reachable_host
from triton_diffusion._server_run import ServerRun
from triton_diffusion.config import ChainConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.run_folder import RunFolder
from triton_diffusion.runtime.stub_processes import is_alive

_PORT_IS_TAKEN = re.compile(r"already in use|address in use|failed to start \w+ service", re.IGNORECASE)
# What a server needs to end when its requests are done: its models end their ranks. It would wait for idle connections
# as long as for requests.
_END_S = 15.0


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
        admin_key: str | None = None,
    ) -> None:
        """Prepare a server for the models in `model_repository`; nothing is started yet.

        A port that is None is chosen among the free ones. The server's log goes to `log_file`, else to our
        stderr. On its way out the server waits up to `exit_timeout_s` for the requests under way.
        `thread_pool_size` is how many calls from one model instance to other models may be under way at once.
        `response_cache_bytes` is the size of Triton's response cache for the models that use it; 0 for none.
        `temporary_folders` are the caller's to remove; should our process die without a chance to, they are
        removed all the same. `admin_key` opens the APIs of Triton that are for the operator alone (see _admin.py); None
        takes a random one. Raises ConfigurationError without a tritonserver.
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
        self.admin_key = admin_key or secrets.token_hex(16)
        self._run: ServerRun | None = None
        self._id = f"triton-diffusion-{secrets.token_hex(4)}"
        self.stop_requested = threading.Event()
        """Set when the server is told to end; it is not started again then."""

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
        return join_address(reachable_host(self._host), self.http_port)

    @property
    def grpc_address(self) -> str:
        """`host:port` of gRPC, as a client on this machine reaches it."""
        return join_address(reachable_host(self._host), self.grpc_port)

    @property
    def metrics_url(self) -> str:
        """The page of the metrics, as a client on this machine reaches it."""
        return f"http://{join_address(reachable_host(self._host), self.metrics_port)}/metrics"

    def wait_until_ended(self, timeout_s: float) -> bool:
        """Wait for the process to end, or the time-out; whether it has ended."""
        return self._started().has_ended.wait(timeout_s)

    def admin(self) -> ServerAdmin:
        """What loads and unloads models of this server."""
        return ServerAdmin(reachable_host(self._host), self.http_port, self.admin_key)

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
        connection = http.client.HTTPConnection(reachable_host(self._host), self.http_port, timeout=5)
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

    def restart(self) -> None:
        """Start the process anew on the same ports; one that still runs is killed, with all that belongs to it.

        Returns at once, see `wait_until_ready`. Raises ConfigurationError if a port was taken meanwhile.
        """
        self.kill_process()
        self._started().has_ended.wait()
        self._given_ports = self._ports
        self._start_process()

    def kill_process(self) -> None:
        """End the server's processes now; unlike after `kill`, it may be started again."""
        self._started().kill_group()

    @property
    def orders(self) -> RunFolder:
        """What the server's chain models are told."""
        return self._started().orders

    def drain(self, timeout_s: float) -> bool:
        """Have new requests refused, and wait until those that were admitted are answered; whether all were.

        Triton itself lets no model call another once it was told to end: so requests that have a stage before them can
        be finished only before that.
        """
        run = self._started()
        run.orders.order_drain()
        give_up_s = time.monotonic() + timeout_s
        while any(is_alive(pid) and not run.orders.is_drained(pid) for pid in run.orders.chains()):
            if run.has_ended.wait(0.05) or time.monotonic() > give_up_s:
                return False
        return True

    def terminate(self) -> None:
        """Send SIGTERM; returns at once. Requests that have a stage before them fail, unless `drain` was called."""
        self.stop_requested.set()
        if self._run is not None:
            self._run.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the server and all processes of its models now."""
        self.stop_requested.set()
        if self._run is not None:
            self._run.kill_group()

    def stop(self, grace_s: float | None = None) -> int | None:
        """Finish the requests that were admitted, refuse others, and end; kill what is left after `grace_s`.

        grace_s: default: the exit timeout, and a little more for the end itself. Returns the exit code, None if the
        server was never started. May be called again.
        """
        self.stop_requested.set()
        if self._run is None:
            return None
        give_up_s = time.monotonic() + (self._exit_timeout_s + _END_S if grace_s is None else grace_s)
        drained = self.drain(self._exit_timeout_s if grace_s is None else grace_s) and bool(self.orders.chains())
        self.terminate()
        if self.wait(_END_S if drained else max(0.0, give_up_s - time.monotonic())) is None:
            self.kill()
        return self.wait()

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Within, SIGTERM and SIGINT end the server in order, and a second one ends it at once. For the main thread."""

        def forward(_signal_number: int, _frame: FrameType | None) -> None:
            if self.stop_requested.is_set():
                self.kill()
            elif self._run is None:
                self.terminate()
            else:
                # Waiting for requests is nothing for a signal handler.
                self.stop_requested.set()
                threading.Thread(target=self.stop, name="stop", daemon=True).start()

        previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

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
        self._run = ServerRun(
            self._installation,
            self._arguments,
            self._log_file,
            guard_grace_s=min(self._exit_timeout_s, 15),
            temporary_folders=self._temporary_folders,
        )
        if self.stop_requested.is_set():  # asked to while there was no process yet
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
            *control_arguments(self._extra_arguments),
            *restriction_arguments(self.admin_key, self._extra_arguments),
            *self._extra_arguments,
        ]

    def _cache_arguments(self) -> list[str]:
        if not self._response_cache_bytes:
            return []
        return self._installation.response_cache_arguments(self._response_cache_bytes)

    def _started(self) -> ServerRun:
        if self._run is None:
            raise RuntimeError("this TritonServer was not started")
        return self._run

    def _ports_were_taken(self, run: ServerRun) -> bool:
        if self.stop_requested.is_set() or None not in self._given_ports:
            return False
        return bool(_PORT_IS_TAKEN.search(run.log.tail(200)))

    def _why_it_ended(self, run: ServerRun) -> str:
        if self.stop_requested.is_set():
            return "tritonserver was stopped before it was ready"
        if run.log.failed_models:
            reasons = "\n".join(f"  {model}: {reason}" for model, reason in run.log.failed_models.items())
            return f"tritonserver could not load its models (more in its log)\n{reasons}"
        what = f"tritonserver ended before it was ready ({describe_exit(run.exit_code)})"
        if run.log.complaints:
            return f"{what}: {'; '.join(run.log.complaints)}"
        return f"{what}; the end of its log:\n{run.log.tail()}"


def describe_exit(exit_code: int | None) -> str:
    """An exit code in words."""
    if exit_code is not None and exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"
