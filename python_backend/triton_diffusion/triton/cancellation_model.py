"""CancellationModel: cancels a request by the id that its caller gave it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from triton_diffusion.config import CancellationConfig
from triton_diffusion.errors import DiffusionError, InvalidRequestError, WorkerGroupError
from triton_diffusion.state import CancelOrder, make_cancel_key, read_num_cancelled, write_cancel_order
from triton_diffusion.triton.conversion import (
    read_cancel_scope,
    read_inputs,
    read_parameters,
    send_final,
    set_up_logging,
    stage_call,
    triton_error,
)
from triton_diffusion.triton.heartbeat import Heartbeat
from triton_diffusion.triton.threads import in_thread

logger = logging.getLogger(__name__)

# A request is in no stage while the chain hands it on: look again for so long before it counts as unknown.
_SEARCH_S = 0.25
_SEARCH_POLL_S = 0.01
# A stage that does not answer by then is taken for dead, and its answer would never come.
_ANSWER_S = 5.0


class CancellationModel:
    """Tells every stage to drop the requests of an id and scope, and says whether there was one.

    The chain model that waits for the stage then answers the caller of the request.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Read which stages there are."""
        set_up_logging(args["model_name"])
        try:
            config = CancellationConfig.from_parameters(read_parameters(args))
        except DiffusionError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._stages = config.all_models
        self._threads = ThreadPoolExecutor(config.max_concurrent_cancels, "cancel")
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
            cancelled = self._cancel(request)
            response = pb_utils.InferenceResponse([pb_utils.Tensor("cancelled", np.array([cancelled]))])
        except Exception as error:
            if not isinstance(error, DiffusionError):
                logger.exception("a cancel failed")
            response = pb_utils.InferenceResponse(error=triton_error(error))
        send_final(sender, response)

    def _cancel(self, request: Any) -> bool:
        request_id = read_inputs(request, ("request_id",)).get("request_id", "")
        if not request_id:
            raise InvalidRequestError("request_id is empty; send the id that the request was sent with")
        order = write_cancel_order(CancelOrder(cancel_key=make_cancel_key(read_cancel_scope(request), request_id)))
        give_up_s = time.monotonic() + _SEARCH_S
        # Every stage is asked: an id may have been given to several requests.
        while not sum(_tell(stage, order) for stage in self._stages):
            if time.monotonic() > give_up_s:
                return False
            time.sleep(_SEARCH_POLL_S)
        return True


def _tell(stage: str, order: bytes) -> int:
    """How many requests it has dropped."""
    try:
        return read_num_cancelled(in_thread(partial(stage_call, stage, order)).result(_ANSWER_S))
    except TimeoutError as error:
        raise WorkerGroupError(f"{stage} has not answered within {_ANSWER_S:g} s; try again later") from error
