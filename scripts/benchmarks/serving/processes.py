"""The processes of a side: stopped while another one has its turn, and gone when the side ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

_OUTPUTS = Path("outputs")
_START_TIMEOUT_S = 300.0
_EXIT_TIMEOUT_S = 10.0


def suspend(pid: int) -> None:
    """Stop a process and all below it."""
    _signal_tree(pid, signal.SIGSTOP)


def resume(pid: int) -> None:
    """Let them go on; the lowest first, so that no process misses the answer of one that it started."""
    _signal_tree(pid, signal.SIGCONT)


def _signal_tree(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [*reversed(root.children(recursive=True)), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextlib.contextmanager
def http_server(module: str, variables: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """A Python module that serves HTTP, started with `--port`: (process id, its address) as soon as it is healthy."""
    port = _free_port()
    log_path = _OUTPUTS / f"benchmark_{module.rpartition('.')[2]}.log"
    log_path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="triton-diffusion-baseline-") as folder, log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", str(port)],
            # What multiprocessing leaves when it is killed lies in our folder.
            env={**os.environ, **variables, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
        )
        guard = _start_guard(process.pid)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, f"{address}/health", log_path)
            yield process.pid, address
        finally:
            _end(process)
            guard.kill()
            guard.communicate()


def _start_guard(group: int) -> subprocess.Popen[bytes]:
    """Kills the process group as soon as this process is gone, however it ended: its end closes the guard's input."""
    return subprocess.Popen(
        ["sh", "-c", f"read _; kill -KILL -- -{group}"], stdin=subprocess.PIPE, start_new_session=True
    )


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    lines = log_path.read_text(errors="replace").splitlines()[-20:]
    raise RuntimeError("\n".join([f"{url} does not answer; the end of {log_path}:", *lines]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, and kill what it leaves."""
    resume(process.pid)
    family = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
    # multiprocessing's tracker ends by itself behind all others, and removes their semaphores.
    trackers = [each for each in family if any("resource_tracker" in word for word in each.cmdline())]
    process.terminate()
    try:
        process.wait(_EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    _kill_after([each for each in family if each not in trackers], patience_s=2.0)
    _kill_after(trackers, patience_s=5.0)
    process.wait()


def _kill_after(processes: Sequence[psutil.Process], *, patience_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
