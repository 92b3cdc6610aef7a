"""Sends the cases from several clients at a time, and looks after the server meanwhile."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from benchmarks.hostile.blobs import blob_cases
from benchmarks.hostile.cases import NUM_CLIENTS, Case, small_request, text_tensor
from benchmarks.hostile.files import file_cases
from benchmarks.hostile.games import game_cases
from benchmarks.hostile.raw import raw_cases
from benchmarks.hostile.values import json_cases, value_cases
from benchmarks.hostile.wire import Connection, RawRequest, RawTensor

_SHARES: dict[str, float] = {"values": 0.4, "json": 0.15, "files": 0.1, "blobs": 0.15, "raw": 0.1, "games": 0.1}
_SLOW_CONNECTIONS = 8

Connect = Callable[[], Connection]


@dataclass
class Outcome:
    """What was answered, and what should not have been."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (kind of request, kind of answer)."""
    violations: list[str] = field(default_factory=list)


def make_cases(num_requests: int, chosen_seed: int, inputs: Mapping[str, str]) -> list[Case]:
    """The cases of a seed, mixed; `inputs` are the datatypes of the model's inputs by name."""
    rng = random.Random(chosen_seed)
    counts = {name: max(1, round(share * num_requests)) for name, share in _SHARES.items()}
    cases = _from_hypothesis(value_cases(dict(inputs)), counts["values"], chosen_seed)
    cases += _from_hypothesis(json_cases(dict(inputs)), counts["json"], chosen_seed)
    for name, make in (("files", file_cases), ("blobs", blob_cases), ("raw", raw_cases), ("games", game_cases)):
        cases += islice(make(rng), counts[name])
    rng.shuffle(cases)
    return cases[:num_requests]


def _from_hypothesis(strategy: SearchStrategy[Case], count: int, chosen_seed: int) -> list[Case]:
    """The examples that a test of this strategy would be run with."""
    made: list[Case] = []

    @seed(chosen_seed)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        made.append(case)

    collect()
    return made


def attack(
    cases: Sequence[Case], connect: Connect, *, between: Callable[[int], None] | None = None, every: int = 500
) -> Outcome:
    """Send all cases; a good request is sent after every so many, and then `between` is called with their number."""
    outcome, lock, local = Outcome(), threading.Lock(), threading.local()
    connections: list[Connection] = []
    good = connect()
    expected = _good_picture(good)

    def send(case: Case) -> None:
        if not hasattr(local, "connection"):
            local.connection = connect()
            with lock:
                connections.append(local.connection)
        answer = case.send(local.connection)
        with lock:
            outcome.answers[case.kind, answer.kind] += 1
            if answer.kind not in case.allowed or not answer.is_clean(case.words):
                outcome.violations.append(f"{case.kind} ({case.words}): {answer.kind}: {answer.message[:500]}")

    try:
        with _slow_connections(good.http_address), ThreadPoolExecutor(NUM_CLIENTS) as pool:
            for start in range(0, len(cases), every):
                for _ in pool.map(send, cases[start : start + every]):
                    pass
                error = np.abs(_good_picture(good).astype(int) - expected).max()
                if error > 1:
                    outcome.violations.append(f"a good request between them: pixels differ by {error}")
                if between is not None:
                    between(min(start + every, len(cases)))
    finally:
        for connection in [good, *connections]:
            connection.close()
    return outcome


def _good_picture(connection: Connection) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    tensors = small_request() | {"output_format": text_tensor("output_format", b"raw")}
    tensors["seed"] = RawTensor("seed", "INT64", [1], (7).to_bytes(8, "little"))
    return np.frombuffer(connection.picture(RawRequest(list(tensors.values()))), np.uint8)


@contextlib.contextmanager
def _slow_connections(http_address: str) -> Iterator[None]:
    """Clients that send a byte a second, for the whole time."""
    host, _, port = http_address.rpartition(":")
    ended = threading.Event()

    def trickle() -> None:
        text = f"POST /v2/models/diffusion/infer HTTP/1.1\r\nHost: {'x' * 100_000}".encode()
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as client:
            for byte in text:
                client.send(bytes([byte]))
                if ended.wait(1.0):
                    return

    threads = [threading.Thread(target=trickle, daemon=True) for _ in range(_SLOW_CONNECTIONS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
