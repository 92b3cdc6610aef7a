"""Requests that differ in everything a request can differ in, and a caller for them."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Literal

from benchmarks.picture import PictureRequest
from benchmarks.serving.load import Planned
from benchmarks.serving.schedule import draw_prompt
from triton_diffusion_client import (
    AsyncDiffusionClient,
    DeadlineExceededError,
    DiffusionClientError,
    GenerationResult,
)

Protocol = Literal["grpc", "http"]

_SIZES = ((128, 128), (64, 192), (256, 128), (64, 64))
_FORMATS = ("png", "jpeg", "webp", "raw")
_MOST_STEPS = 20
# So many that the prompt cache has seen them all before the warm-up ends.
_NUM_PROMPTS = 32
_CANCELLED_SHARE = 1 / 3
_CANCELLED_WITHIN_S = 3.0
_DEADLINE_S = 30.0
_REQUEST_TIMEOUT_S = 180.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedRequest(PictureRequest):
    """A request with what only the mix varies."""

    protocol: Protocol
    streamed: bool
    num_outputs: int
    output_format: str
    priority: int
    deadline_s: float | None

    def client_options(self) -> dict[str, Any]:
        """The options of AsyncDiffusionClient.generate or, where it is streamed, of its stream."""
        own = {
            "num_images_per_prompt": self.num_outputs,
            "output_format": self.output_format,
            "priority": self.priority,
            "deadline_s": self.deadline_s,
            "timeout_s": _REQUEST_TIMEOUT_S,
        }
        return super().client_options() | own | ({"preview_interval": 4} if self.streamed else {})


def mixed_plan(seed: int, max_sequence_length: int, goes_on: Callable[[], bool]) -> Iterator[Planned]:
    """Requests for as long as it goes on, a third of which are cancelled at a random moment."""
    choose = random.Random(seed)
    while goes_on():
        is_cancelled = choose.random() < _CANCELLED_SHARE
        yield Planned(
            request=_draw_request(choose, max_sequence_length),
            cancel_after_s=choose.uniform(0, _CANCELLED_WITHIN_S) if is_cancelled else None,
        )


def _draw_request(choose: random.Random, max_sequence_length: int) -> MixedRequest:
    height, width = choose.choice(_SIZES)
    is_guided = choose.random() < 0.3
    protocol: Protocol = choose.choice(("grpc", "http"))
    streamed = choose.random() < 0.3
    # Events over HTTP carry no raw pixels.
    formats = _FORMATS[:-1] if streamed and protocol == "http" else _FORMATS
    return MixedRequest(
        seed=choose.randrange(2**31),
        prompt=draw_prompt(choose.randrange(_NUM_PROMPTS)),
        negative_prompt="a green star" if is_guided else "",
        guidance_scale=3.0 if is_guided else 1.0,
        height=height,
        width=width,
        num_inference_steps=choose.randint(1, _MOST_STEPS),
        max_sequence_length=max_sequence_length,
        protocol=protocol,
        streamed=streamed,
        num_outputs=choose.choice((1, 1, 2, 3)),
        output_format=choose.choice(formats),
        priority=choose.randint(0, 9),
        deadline_s=_DEADLINE_S if choose.random() < 0.2 else None,
    )


class MixedCaller:
    """Sends mixed requests, and counts what becomes of them."""

    def __init__(self, clients: Mapping[Protocol, AsyncDiffusionClient]) -> None:
        self._clients = clients
        self.num_answered = 0
        self.num_late = 0
        """Given up by the server because of their deadline, as they asked."""
        self.errors: Counter[str] = Counter()
        """All other errors, by their kind and message."""

    async def ask(self, request: PictureRequest) -> bytes:
        """The first output; empty where there is none."""
        assert isinstance(request, MixedRequest)
        try:
            result = await self._result(request)
        except DeadlineExceededError:
            self.num_late += 1
            return b""
        except DiffusionClientError as error:
            self.errors[f"{type(error).__name__}: {error}"] += 1
            return b""
        if len(result.outputs) != request.num_outputs:
            self.errors[f"{len(result.outputs)} outputs in place of {request.num_outputs}"] += 1
        self.num_answered += 1
        return result.outputs[0].data

    async def _result(self, request: MixedRequest) -> GenerationResult:
        client = self._clients[request.protocol]
        if not request.streamed:
            return await client.generate(request.prompt, **request.client_options())
        async with aclosing(client.stream(request.prompt, **request.client_options())) as events:
            async for event in events:
                if isinstance(event, GenerationResult):
                    return event
        raise AssertionError("a stream ends with its result or raises")
