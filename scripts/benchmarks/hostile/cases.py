"""A hostile request: how it is sent, and what it may be answered with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.hostile.answers import DOCUMENTED, Answer
from benchmarks.hostile.wire import Connection, RawTensor, bytes_elements

NUM_CLIENTS = 8
"""That send at the same time."""


@dataclass(frozen=True)
class Case:
    """One request."""

    kind: str
    """Its line in the table."""
    words: str
    """What is wrong with it, for the report of a violation."""
    send: Callable[[Connection], Answer]
    allowed: frozenset[str] = DOCUMENTED


def text_tensor(name: str, *values: bytes) -> RawTensor:
    """A BYTES tensor of shape [number of values]."""
    return RawTensor(name, "BYTES", [len(values)], bytes_elements(values))


def int_tensor(name: str, value: int) -> RawTensor:
    """An INT32 tensor of shape [1]."""
    return RawTensor(name, "INT32", [1], value.to_bytes(4, "little", signed=True))


def small_request() -> dict[str, RawTensor]:
    """The inputs of a good request that takes little time, by name."""
    return {
        "prompt": text_tensor("prompt", b"a circle"),
        "height": int_tensor("height", 16),
        "width": int_tensor("width", 16),
        "num_inference_steps": int_tensor("num_inference_steps", 1),
        "max_sequence_length": int_tensor("max_sequence_length", 8),
    }
