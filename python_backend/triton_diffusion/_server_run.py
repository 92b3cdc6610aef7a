"""One tritonserver process, from its start to the clean-up after it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from triton_diffusion import _server_guard, run_folder
from triton_diffusion._installation import TritonInstallation
from triton_diffusion._server_log import ServerLog
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.run_folder import RunFolder

_SHARED_MEMORY = Path("/dev/shm")


class ServerRun:
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
        self.log = ServerLog(log_file)
        self._folder = Path(tempfile.mkdtemp(prefix="triton-diffusion-"))
        self.orders = RunFolder(self._folder)
        self._shared_memory = f"triton_diffusion_{os.getpid()}_{secrets.token_hex(4)}_"
        command = [
            str(installation.executable),
            *installation.prepare_backend_directory(self._folder / "backends"),
            *arguments(self._shared_memory),
        ]
        try:
            environment = installation.environment() | {run_folder.VARIABLE: str(self._folder)}
            self._process = self._start_server(command, environment)
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
