"""Watches a server that is ready: loads models anew whose process died, and starts the server again when it dies.

Triton does not notice the death of a Python model's process: the model stays "ready", new requests fail after a second,
and those that were in it are never answered. The chain models answer the requests that were in a stage
(triton/chain_model.py); those that were in a chain end only with the server, whose connections their callers see break.
A process that lives but gives no sign of life any more (triton/heartbeat.py) is killed, and then as dead as the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable

from triton_diffusion._admin import AdminError
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.runtime.restarts import back_off_s
from triton_diffusion.runtime.silence import Silence
from triton_diffusion.runtime.stub_processes import find_stubs, is_alive
from triton_diffusion.server import TritonServer, describe_exit

logger = logging.getLogger(__name__)

# Models are loaded by others, too: look for their processes now and then.
_SEARCH_S = 5.0
_LONGEST_PAUSE_S = 30.0
# A model without requests is gone at once, on a busy machine after seconds. Of a chain that is not, the whole server
# has to be started anew, so it is given more time.
_UNLOAD_S = 1.0
_UNLOAD_CHAIN_S = 6.0
_LOAD_ATTEMPTS = 4


class Supervisor:
    """Keeps one server alive, from when it is ready until it shall end.

    report: is given one line for every fault, with what is done about it.
    max_restarts: starts within `window_s` after which a server that dies again is given up.
    startup_timeout_s: seconds that the loading of all models may take.
    silence_s: seconds without a sign of life after which a model's process is killed; it gives one every second.
    """

    def __init__(
        self,
        server: TritonServer,
        report: Callable[[str], None] = logger.warning,
        *,
        max_restarts: int = 5,
        window_s: float = 600.0,
        startup_timeout_s: float = 1860.0,
        silence_s: float = 30.0,
        poll_s: float = 0.25,
    ) -> None:
        self._server = server
        self._report = report
        self._max_restarts = max_restarts
        self._startup_timeout_s = startup_timeout_s
        self._silence_s = silence_s
        self._silence = Silence()
        self._poll_s = poll_s
        self._restarts = _Past(window_s)
        self._deaths: defaultdict[str, _Past] = defaultdict(lambda: _Past(window_s))
        self._stubs: dict[int, str] = {}
        self._searched_s = 0.0
        self._healing: set[str] = set()
        self._replaced: dict[int, str] = {}
        """Processes of chains that finish what they have, beside the ones that took their place."""
        self._reason = ""
        """Why we ended the server; empty: it died by itself."""

    def run(self) -> int | None:
        """Return when the server has ended for good: its exit code (negative: a signal), None if it did not start."""
        self._search()
        while True:
            if not self._server.wait_until_ended(self._poll_s):
                self._look_at_stubs()
                continue
            exit_code = self._server.wait()
            # 0: it was told to end, though not by us.
            if self._server.stop_requested.is_set() or exit_code == 0:
                return exit_code
            if not self._start_again(self._reason or f"tritonserver {describe_exit(exit_code)}"):
                return exit_code
            self._reason = ""
            self._search()

    # ---------------------------------------------------------------- the server

    def _start_again(self, reason: str) -> bool:
        """Whether the server is ready again."""
        while self._restarts.count() < self._max_restarts:
            pause_s = back_off_s(self._restarts.count(), _LONGEST_PAUSE_S)
            self._restarts.note()
            self._report(
                f"{reason}; starting it again in {pause_s:g} s "
                f"({self._restarts.count()} of {self._max_restarts} starts in {self._restarts.window_s:g} s)"
            )
            if self._server.stop_requested.wait(pause_s):
                return False
            started_s = time.monotonic()
            try:
                self._server.restart()
                self._server.wait_until_ready(self._startup_timeout_s)
            except ConfigurationError as error:
                if self._server.stop_requested.is_set():
                    return False
                reason = str(error)
                continue
            self._report(f"tritonserver is ready again after {time.monotonic() - started_s:.1f} s")
            return True
        self._report(
            f"{reason}; given up after {self._max_restarts} starts in {self._restarts.window_s:g} s: "
            "look at its log for what ends it"
        )
        return False

    def _end_server(self, reason: str) -> None:
        # When the server ends, so do all its models: the first reason is the cause.
        if not self._reason and is_alive(self._server.pid):
            self._reason = reason
            self._server.kill_process()

    # ---------------------------------------------------------------- its models

    def _search(self) -> None:
        found = find_stubs(self._server.pid)
        self._stubs = {pid: model for pid, model in found.items() if pid not in self._replaced}
        self._searched_s = time.monotonic()

    def _look_at_stubs(self) -> None:
        if not is_alive(self._server.pid):
            return
        known = self._stubs
        dead = {pid: model for pid, model in known.items() if pid not in self._replaced and not is_alive(pid)}
        if dead or time.monotonic() - self._searched_s > _SEARCH_S:
            self._search()
        if self._server.stop_requested.is_set() or not is_alive(self._server.pid):
            return
        for pid, model in dead.items():
            is_replaced = _count(self._stubs, model) >= _count(known, model)
            if not is_replaced:
                self._start(self._heal, model, pid)
        self._look_at_replaced()
        self._kill_silent()
        for pid in self._server.orders.worn_chains() & (self._stubs.keys() - self._replaced.keys()):
            self._start(self._replace, self._stubs[pid], pid)

    def _start(self, mend: Callable[[str, int], None], model: str, pid: int) -> None:
        """In a thread: loading may take minutes, in which other models may die."""
        if model not in self._healing:
            self._healing.add(model)
            threading.Thread(target=self._mend, args=(mend, model, pid), name=f"mend-{model}", daemon=True).start()

    def _mend(self, mend: Callable[[str, int], None], model: str, pid: int) -> None:
        try:
            mend(model, pid)
        except AdminError as error:
            if not self._server.stop_requested.is_set():
                self._end_server(f"{model} could not be loaded anew ({error})")
        finally:
            self._healing.discard(model)

    def _look_at_replaced(self) -> None:
        for pid in [pid for pid in self._replaced if not is_alive(pid)]:
            chain = self._replaced.pop(pid)
            # One that ended in order waits for no more signs of life.
            if pid in self._server.orders.beats():
                self._end_server(f"{chain} died with requests in it, whose callers only the end of the server tells")

    def _kill_silent(self) -> None:
        models = self._stubs | self._replaced
        for pid, silent_s in self._silence.observe(self._server.orders.beats()).items():
            if silent_s >= self._silence_s and pid in models and is_alive(pid):
                self._report(
                    f"the process of {models[pid]} (pid {pid}) lives, but has given no sign of life for "
                    f"{silent_s:.0f} s; killing it"
                )
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _heal(self, model: str, pid: int) -> None:
        started_s = time.monotonic()
        # One that somebody unloads ends in order.
        if self._server.admin().state(model) != "READY":
            return
        self._report(f"the process of {model} (pid {pid}) died; loading the model anew")
        self._load_anew(model, pid)
        self._report(f"{model} is ready again after {time.monotonic() - started_s:.1f} s")

    def _replace(self, chain: str, pid: int) -> None:
        """Load a chain anew whose process lost too many calls; the old one ends when it has answered its requests."""
        admin = self._server.admin()
        if admin.state(chain) != "READY":
            return
        started_s = time.monotonic()
        self._report(f"{chain} (pid {pid}) waits for the answers of too many stages that died; replacing its process")
        self._replaced[pid] = chain
        admin.unload(chain)
        # Not waiting until it has gone: what stages that died will never answer keeps it for ever.
        admin.load(chain, self._startup_timeout_s)
        self._search()
        self._server.orders.retire(pid)
        self._report(f"{chain} was replaced in {time.monotonic() - started_s:.1f} s")

    def _load_anew(self, model: str, pid: int) -> None:
        admin = self._server.admin()
        is_chain = pid in self._server.orders.chains()
        admin.unload(model)
        if not admin.wait_until_gone(model, _UNLOAD_CHAIN_S if is_chain else _UNLOAD_S) and is_chain:
            self._end_server(f"{model} died with requests in it, whose callers only the end of the server tells")
            raise AdminError("the server is ended")
        deaths = self._deaths[model]
        for attempt in range(_LOAD_ATTEMPTS):
            self._server.stop_requested.wait(back_off_s(deaths.count(), _LONGEST_PAUSE_S))
            deaths.note()
            try:
                admin.load(model, self._startup_timeout_s)
                return
            except AdminError as error:
                if attempt + 1 == _LOAD_ATTEMPTS or not self._server.is_running():
                    raise
                self._report(f"{model} could not be loaded: {error}; trying again")


class _Past:
    """How often something happened of late."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._times_s: list[float] = []

    def note(self) -> None:
        self._times_s.append(time.monotonic())

    def count(self) -> int:
        self._times_s = [at_s for at_s in self._times_s if time.monotonic() - at_s < self.window_s]
        return len(self._times_s)


def _count(stubs: dict[int, str], model: str) -> int:
    return sum(name == model for name in stubs.values())
