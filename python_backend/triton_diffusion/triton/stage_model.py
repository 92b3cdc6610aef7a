"""StageModel: a StageService as a Triton model."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import triton_python_backend_utils as pb_utils

from triton_diffusion.config import StageConfig
from triton_diffusion.errors import DiffusionError
from triton_diffusion.runtime.service import Answer, StageService
from triton_diffusion.triton.conversion import (
    STATE,
    read_parameters,
    read_state_tensor,
    send_final,
    set_up_logging,
    stage_error,
    state_tensor,
)
from triton_diffusion.triton.metrics import MetricsPublisher


class StageModel:
    """Takes a state, answers with a state. `execute` returns at once, so one instance has many requests in work."""

    stage: ClassVar[str]
    """"text_encoding", "denoising" or "decoding"."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the worker groups; the model becomes ready when they have loaded."""
        set_up_logging(args["model_name"])
        try:
            self._service = StageService(self.stage, StageConfig.from_parameters(read_parameters(args)))
            self._service.start()
        except DiffusionError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._metrics = MetricsPublisher(args["model_name"], self._service.metrics)

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to the service; its answer goes out through the response sender."""
        for request in requests:
            sender = request.get_response_sender()
            tensor = pb_utils.get_input_tensor_by_name(request, STATE)
            self._service.submit(read_state_tensor(tensor), partial(_send, sender))

    def finalize(self) -> None:
        """End the worker groups."""
        self._metrics.stop()
        self._service.stop()


def _send(sender: Any, answer: Answer) -> None:
    if isinstance(answer, bytes):
        send_final(sender, pb_utils.InferenceResponse(output_tensors=[state_tensor(answer)]))
    else:
        send_final(sender, pb_utils.InferenceResponse(error=stage_error(answer)))
