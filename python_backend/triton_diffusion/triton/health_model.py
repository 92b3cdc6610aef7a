"""HealthModel: says whether requests are taken, and how each stage is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from triton_diffusion.config import HealthConfig
from triton_diffusion.errors import DiffusionError, without_inside
from triton_diffusion.state import StageHealth, read_health, write_health_query
from triton_diffusion.triton.conversion import (
    json_tensor,
    read_parameters,
    send_final,
    set_up_logging,
    stage_call,
    triton_error,
)
from triton_diffusion.triton.heartbeat import Heartbeat
from triton_diffusion.triton.threads import in_thread

logger = logging.getLogger(__name__)

# A stage that does not answer by then is taken for dead: it answers from its memory, whatever it is doing.
_ANSWER_S = 5.0


class HealthModel:
    """Asks every stage at each request; the answer tells which of them take requests, and why the others do not."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read which stages there are."""
        set_up_logging(args["model_name"])
        try:
            config = HealthConfig.from_parameters(read_parameters(args))
        except DiffusionError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._stages = config.all_models
        self._threads = ThreadPoolExecutor(config.max_concurrent_questions, "health")
        self._heartbeat = Heartbeat()

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to a thread; the answer goes out through the response sender."""
        for request in requests:
            self._threads.submit(self._run, request.get_response_sender())

    def finalize(self) -> None:
        """Wait for what is under way."""
        self._heartbeat.stop()
        self._threads.shutdown()

    def _run(self, sender: Any) -> None:
        try:
            stages = _ask_all(self._stages)
            ready = all(stage["ready"] for stage in stages.values())
            tensors = [
                json_tensor("health", {"ready": ready, "stages": stages}),
                pb_utils.Tensor("ready", np.array([ready])),
            ]
            response = pb_utils.InferenceResponse(tensors)
        except Exception as error:
            logger.exception("a question could not be answered")
            response = pb_utils.InferenceResponse(error=triton_error(error))
        send_final(sender, response)


def _ask_all(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By stage model, its answer; all are asked at the same time."""
    answers = {model: in_thread(partial(_ask, model)) for model in models}
    wait(answers.values(), timeout=_ANSWER_S)
    return {
        model: _as_json(answer.result() if answer.done() else _away(model, f"no answer within {_ANSWER_S:g} s"))
        for model, answer in answers.items()
    }


def _ask(model: str) -> StageHealth:
    try:
        answer = stage_call(model, write_health_query())
    except DiffusionError as error:
        return _away(model, str(error))
    except Exception as error:
        logger.exception("%s could not be asked", model)
        return _away(model, f"it could not be asked: {error!r}; look at the server's log")
    try:
        return read_health(answer)
    except (DiffusionError, LookupError, TypeError, ValueError) as error:
        logger.exception("the answer of %s could not be read", model)
        return _away(model, f"its answer could not be read: {error!r}; is it of another version?")


def _away(model: str, reason: str) -> StageHealth:
    return StageHealth(stage=model, ready=False, ready_replicas=0, num_replicas=0, restarts_total=0, reason=reason)


def _as_json(health: StageHealth) -> dict[str, Any]:
    values = dataclasses.asdict(health)
    del values["stage"]
    return values | {"reason": without_inside(health.reason) or None}
