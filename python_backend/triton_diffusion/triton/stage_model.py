"""StageModel: a StageService as a Triton model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import triton_python_backend_utils as pb_utils

from triton_diffusion.config import StageConfig
from triton_diffusion.errors import DiffusionError, InvalidRequestError, from_wire, to_wire
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.runtime.held_request import Answer
from triton_diffusion.runtime.placing import place_on_cores
from triton_diffusion.runtime.service import StageService
from triton_diffusion.stage_key import check_key, own_key
from triton_diffusion.state import (
    CancelOrder,
    HealthQuery,
    StageHealth,
    read_stage_input,
    write_health,
    write_health_query,
    write_num_cancelled,
)
from triton_diffusion.triton.conversion import (
    STATE,
    read_parameters,
    read_state_tensor,
    send_final,
    set_up_logging,
    stage_error,
    state_tensor,
)
from triton_diffusion.triton.heartbeat import Heartbeat
from triton_diffusion.triton.metrics import MetricsPublisher

logger = logging.getLogger(__name__)


class StageModel:
    """Takes a state, answers with a state. `execute` returns at once, so one instance has many requests in work.

    Of a stage that its checkpoint does not have, the model loads and starts no ranks.
    """

    stage: ClassVar[str]
    """One of STAGE_MODELS (runtime/work.py)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the worker groups; the model becomes ready when they have loaded."""
        set_up_logging(args["model_name"])
        self._service: StageService | None = None
        self._metrics: MetricsPublisher | None = None
        self._heartbeat: Heartbeat | None = None
        try:
            own_key()
            config = StageConfig.from_parameters(read_parameters(args))
            checkpoint = open_checkpoint(config.model_path)
            if self.stage not in find_family(checkpoint).stage_components(checkpoint):
                logger.info("a %s has no %s: this model has nothing to do", checkpoint.pipeline_class, self.stage)
                self._heartbeat = Heartbeat()
                return
            self._service = StageService(self.stage, place_on_cores(config, self.stage, checkpoint))
            self._service.start()
        except DiffusionError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._metrics = MetricsPublisher(args["model_name"], self._service.metrics)
        self._heartbeat = Heartbeat(partial(_ask_service, self._service))

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to the service; its answer goes out through the response sender."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                check_key(request.parameters())
                blob = read_state_tensor(pb_utils.get_input_tensor_by_name(request, STATE))
            except Exception as error:
                _send(sender, from_wire(*to_wire(error)))
                continue
            if self._service is None:
                _send(sender, _answer_idle(self.stage, blob))
            else:
                self._service.submit(blob, partial(_send, sender))

    def is_ready(self) -> bool:
        """What Triton asks from 26.03 on: False while the worker groups die again and again."""
        return self._service is None or self._service.health().ready

    def finalize(self) -> None:
        """End the worker groups."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._metrics is not None:
            self._metrics.stop()
        if self._service is not None:
            self._service.stop()


def _ask_service(service: StageService, beat: Callable[[], None]) -> None:
    """Call `beat` when the thread that all requests depend on has answered; one that broke down answers an error."""
    service.submit(write_health_query(), lambda answer: beat() if isinstance(answer, bytes) else None)


def _answer_idle(stage: str, blob: bytes) -> Answer:
    """What a stage says that this checkpoint does not have."""
    try:
        match read_stage_input(blob):
            case CancelOrder():
                return write_num_cancelled(0)
            case HealthQuery():
                return write_health(StageHealth(stage, True, ready_replicas=0, num_replicas=0, restarts_total=0))
    except DiffusionError as error:
        return error
    return InvalidRequestError("this model's checkpoint has no such stage")


def _send(sender: Any, answer: Answer) -> None:
    if isinstance(answer, bytes):
        send_final(sender, pb_utils.InferenceResponse(output_tensors=[state_tensor(answer)]))
    else:
        send_final(sender, pb_utils.InferenceResponse(error=stage_error(answer)))
