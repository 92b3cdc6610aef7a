"""HealthModel: says whether requests are taken, and how each stage is."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from triton_diffusion.config import HealthConfig
from triton_diffusion.errors import DiffusionError, without_inside
from triton_diffusion.state import StageHealth, read_health, write_health_query
from triton_diffusion.triton.conversion import json_tensor, read_parameters, send_final, set_up_logging, stage_call

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

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to a thread; the answer goes out through the response sender."""
        for request in requests:
            self._threads.submit(self._run, request.get_response_sender())

    def finalize(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown()

    def _run(self, sender: Any) -> None:
        stages = _ask_all(self._stages)
        ready = all(stage["ready"] for stage in stages.values())
        tensors = [
            json_tensor("health", {"ready": ready, "stages": stages}),
            pb_utils.Tensor("ready", np.array([ready])),
        ]
        send_final(sender, pb_utils.InferenceResponse(tensors))


def _ask_all(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By stage model, its answer; all are asked at the same time."""
    answers: dict[str, StageHealth] = {}
    # Daemons: the call to a model whose process dies meanwhile never ends.
    threads = [threading.Thread(target=_ask, args=(model, answers), daemon=True) for model in models]
    for thread in threads:
        thread.start()
    give_up_s = time.monotonic() + _ANSWER_S
    for thread in threads:
        thread.join(max(0.0, give_up_s - time.monotonic()))
    return {model: _as_json(answers.get(model) or _silent(model)) for model in models}


def _ask(model: str, answers: dict[str, StageHealth]) -> None:
    try:
        answers[model] = read_health(stage_call(model, write_health_query()))
    except DiffusionError as error:
        answers[model] = _away(model, str(error))


def _silent(model: str) -> StageHealth:
    return _away(model, f"no answer within {_ANSWER_S:g} s")


def _away(model: str, reason: str) -> StageHealth:
    return StageHealth(stage=model, ready=False, ready_replicas=0, num_replicas=0, restarts_total=0, reason=reason)


def _as_json(health: StageHealth) -> dict[str, Any]:
    values = dataclasses.asdict(health)
    del values["stage"]
    return values | {"reason": without_inside(health.reason) or None}
