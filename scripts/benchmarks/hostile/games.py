"""Games with ids: the same one again and again, others' ids, cancels at the same time, callers that go away."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from benchmarks.hostile.answers import Answer
from benchmarks.hostile.cases import Case, int_tensor, small_request, text_tensor
from benchmarks.hostile.wire import Connection, RawRequest

_IDS = ("a", "b", "c", "0", "-1", "../a", "💠", "a" * 2000)
_SCOPES: tuple[str | int | bool, ...] = ("", "s", "t" * 5000, 7, True)


def game_cases(rng: random.Random) -> Iterator[Case]:
    """Without end: requests that share few ids, and among them cancels of these."""
    while True:
        request_id = rng.choice(_IDS)
        steps = rng.choice([1, 8, 24])
        tensors = small_request() | {"num_inference_steps": int_tensor("num_inference_steps", steps)}
        scope = {"cancel_scope": rng.choice(_SCOPES)} if rng.random() < 0.7 else {}
        request = RawRequest(list(tensors.values()), request_id=request_id, parameters=scope)
        yield Case("ids", f"{request_id[:9]}, {steps} steps", partial(_infer, request, rng.random() < 0.5))
        for _ in range(rng.randint(1, 3)):
            named = rng.choice([request_id, *_IDS, ""])
            cancel = RawRequest([text_tensor("request_id", named.encode())], "cancellation", parameters=scope)
            yield Case("cancels", named[:9], partial(_infer, cancel, rng.random() < 0.5))
        stream = RawRequest(list(tensors.values()), "diffusion_stream", request_id=request_id, parameters=scope)
        yield Case("callers that leave", "a stream", partial(_leave, stream, rng.randrange(4)))
        yield Case("callers that leave", "a call", partial(_leave_call, request.to_grpc(), rng.uniform(0.001, 0.1)))


def _infer(request: RawRequest, over_http: bool, connection: Connection) -> Answer:
    return connection.infer_http(request) if over_http else connection.infer_grpc(request)


def _leave(request: RawRequest, after: int, connection: Connection) -> Answer:
    return connection.start_and_leave(request, after=after)


def _leave_call(message: bytes, after_s: float, connection: Connection) -> Answer:
    return connection.call("ModelInfer", message, timeout_s=after_s)
