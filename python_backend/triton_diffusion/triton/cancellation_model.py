"""CancellationModel: cancels a request by the id that its caller gave it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from triton_diffusion.config import CancellationConfig
from triton_diffusion.errors import InvalidRequestError, WorkerGroupError
from triton_diffusion.state import CancelOrder, make_cancel_key, read_num_cancelled, write_cancel_order
from triton_diffusion.triton.conversion import read_cancel_scope, read_inputs, stage_call
from triton_diffusion.triton.threaded_model import ThreadedModel
from triton_diffusion.triton.threads import in_thread

# A request is in no stage while the chain hands it on: look again for so long before it counts as unknown.
_SEARCH_S = 0.25
_SEARCH_POLL_S = 0.01
# A stage that does not answer by then is taken for dead, and its answer would never come.
_ANSWER_S = 5.0


class CancellationModel(ThreadedModel):
    """Tells every stage to drop the requests of an id and scope, and says whether there was one.

    The chain model that waits for the stage then answers the caller of the request.
    """

    def configure(self, parameters: Mapping[str, str]) -> int:
        """Read which stages there are."""
        config = CancellationConfig.from_parameters(parameters)
        self._stages = config.all_models
        return config.max_concurrent_cancels

    def answer(self, request: Any) -> Sequence[Any]:
        """Whether there was such a request."""
        return [pb_utils.Tensor("cancelled", np.array([self._cancel(request)]))]

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
