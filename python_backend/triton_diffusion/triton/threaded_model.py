"""ThreadedModel: answers each request in a thread; for models that ask the stages, and draw nothing themselves."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton_python_backend_utils as pb_utils

from triton_diffusion.errors import DiffusionError
from triton_diffusion.triton.conversion import read_parameters, send_final, set_up_logging, triton_error
from triton_diffusion.triton.heartbeat import Heartbeat

logger = logging.getLogger(__name__)


class ThreadedModel(ABC):
    """A model whose requests may wait for stages, and do not wait for each other."""

    @abstractmethod
    def configure(self, parameters: Mapping[str, str]) -> int:
        """Read the `parameters` of config.pbtxt. Returns how many requests are answered at once; others wait.

        Raises:
            ConfigurationError: they are wrong.
        """

    @abstractmethod
    def answer(self, request: Any) -> Sequence[Any]:
        """The output tensors; what is raised becomes the error that the caller gets."""

    def initialize(self, args: dict[str, str]) -> None:
        """Be ready for requests."""
        set_up_logging(args["model_name"])
        try:
            num_threads = self.configure(read_parameters(args))
        except DiffusionError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._threads = ThreadPoolExecutor(num_threads, args["model_name"])
        self._heartbeat = Heartbeat()

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to a thread; the answer goes out through the response sender."""
        for request in requests:
            self._threads.submit(self._run, request, request.get_response_sender())

    def finalize(self) -> None:
        """Wait for what is under way."""
        self._heartbeat.stop()
        self._threads.shutdown()

    def _run(self, request: Any, sender: Any) -> None:
        try:
            response = pb_utils.InferenceResponse(list(self.answer(request)))
        except Exception as error:
            if not isinstance(error, DiffusionError):
                logger.exception("a request could not be answered")
            response = pb_utils.InferenceResponse(error=triton_error(error))
        send_final(sender, response)
