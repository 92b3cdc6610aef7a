"""Shows the supervisor that a model's process works, where Triton would go on saying that it is ready."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from triton_diffusion.run_folder import BEAT_S, ModelFolder

logger = logging.getLogger(__name__)


class Heartbeat:
    """A thread that gives a sign of life every second, and `stop`s before the model ends."""

    def __init__(self, ask: Callable[[Callable[[], None]], object] = lambda beat: beat()) -> None:
        """`ask` is given what to call when that of the process which must work has answered."""
        self._ask = ask
        self._folder = ModelFolder()
        self._stopping = threading.Event()
        # A daemon: what it asks may hang, and the process end.
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No sign will come, and none is waited for."""
        self._stopping.set()
        self._thread.join(BEAT_S)
        self._folder.end_beats()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._ask(self._beat)
            except Exception:
                logger.exception("no sign of life could be given")
            self._stopping.wait(BEAT_S)

    def _beat(self) -> None:
        if not self._stopping.is_set():
            self._folder.beat()
