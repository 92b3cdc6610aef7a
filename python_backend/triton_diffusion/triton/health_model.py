"""HealthModel: says whether requests are taken, and how each stage is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from triton_diffusion.config import HealthConfig
from triton_diffusion.errors import DiffusionError, without_inside
from triton_diffusion.state import StageHealth, read_health, write_health_query
from triton_diffusion.triton.conversion import json_tensor, stage_call
from triton_diffusion.triton.threaded_model import ThreadedModel
from triton_diffusion.triton.threads import in_thread

logger = logging.getLogger(__name__)

# A stage that does not answer by then is taken for dead: it answers from its memory, whatever it is doing.
_ANSWER_S = 5.0


class HealthModel(ThreadedModel):
    """Asks every stage at each request; the answer tells which of them take requests, and why the others do not."""

    def configure(self, parameters: Mapping[str, str]) -> int:
        """Read which stages there are."""
        config = HealthConfig.from_parameters(parameters)
        self._stages = config.all_models
        return config.max_concurrent_questions

    def answer(self, request: Any) -> Sequence[Any]:
        """`health` in JSON, and `ready`."""
        stages = _ask_all(self._stages)
        ready = all(stage["ready"] for stage in stages.values())
        return [
            json_tensor("health", {"ready": ready, "stages": stages}),
            pb_utils.Tensor("ready", np.array([ready])),
        ]


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
