"""Bytes that are no request: neither HTTP, nor JSON, nor protobuf."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import socket
from collections.abc import Iterator
from functools import partial

from benchmarks.hostile.answers import UNREADABLE, Answer, http_answer
from benchmarks.hostile.cases import Case, small_request
from benchmarks.hostile.wire import Connection, RawRequest

_PATIENCE_S = 2.0
_METHODS = ("ModelInfer", "ModelStreamInfer", "ServerLive", "ModelReady", "ModelConfig", "RepositoryIndex", "Nothing")
_INFER = "/v2/models/diffusion/infer"
_GENERATE = "/v2/models/diffusion/generate"
_PATHS = (
    *("/", "/v2", "/v2/models/../../etc/passwd", "/v2/models/diffusion/versions/99999999999999999999/infer"),
    *("/v2/models/%00/infer", "/v2/models/" + "a" * 5000, "/v2/models/diffusion/infer?" + "x" * 5000, "/v2/nothing"),
    *("/v2/models/diffusion/config", "/v2/models/no_such_model/infer", "/v2/models/diffusion/nothing"),
)


def raw_cases(rng: random.Random) -> Iterator[Case]:
    """Without end."""
    header, data = RawRequest(list(small_request().values())).to_http()
    message = RawRequest(list(small_request().values())).to_grpc()
    while True:
        for words, body in _bodies(rng, header, data).items():
            length = rng.choice([len(header), 0, 1, -1, len(header) + 1, 2**31, 2**63, 2**64, "x", ""])
            headers = {} if rng.random() < 0.3 else {"Inference-Header-Content-Length": str(length)}
            path = rng.choice([_INFER, _INFER, _GENERATE])
            yield Case("bad bodies, HTTP", words, partial(_post, path, body, headers), UNREADABLE)
            method, path = rng.choice(["GET", "PUT", "DELETE", "POST", "OPTIONS", "\x7fX"]), rng.choice(_PATHS)
            yield Case("bad paths, HTTP", f"{method} {path[:80]}", partial(_request, method, path), UNREADABLE)
            name, damaged = rng.choice(_METHODS), _damaged(rng, message)
            yield Case("bad messages, gRPC", name, partial(_call, name, damaged), UNREADABLE)
        for words, text in _conversations(rng).items():
            yield Case("bad conversations, HTTP", words, partial(_converse, text), UNREADABLE)


def _post(path: str, body: bytes, headers: dict[str, str], connection: Connection) -> Answer:
    return connection.post(path, body, headers)


def _request(method: str, path: str, connection: Connection) -> Answer:
    try:
        return connection.post(path, b"", method=method)
    except ValueError:  # http.client does not send this; say it by hand.
        return _converse(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode(), connection)


def _call(method: str, message: bytes, connection: Connection) -> Answer:
    return connection.call(method, message)


def _converse(text: bytes, connection: Connection) -> Answer:
    """Send bytes on a connection of their own, and see what comes."""
    host, _, port = connection.http_address.rpartition(":")
    with contextlib.suppress(ConnectionError), socket.create_connection((host, int(port)), 30) as client:
        client.settimeout(_PATIENCE_S)
        client.sendall(text)
        try:
            answer = client.recv(1 << 16)
        except TimeoutError:
            return Answer("waits for more")
        if answer.startswith(b"HTTP/"):
            head, _, body = answer.partition(b"\r\n\r\n")
            with contextlib.suppress(ValueError, IndexError):
                return http_answer(int(head.split()[1]), body)
    return Answer("closed")


def _bodies(rng: random.Random, header: bytes, data: bytes) -> dict[str, bytes]:
    content = json.loads(header)
    content["inputs"][0] |= {"parameters": {"binary_data_size": rng.choice([-1, 2**31, 2**63 - 1, "x", 0, 7.5])}}
    return {
        "nothing": b"",
        "cut off": (header + data)[: rng.randint(0, len(header + data))],
        "random": rng.randbytes(rng.randint(1, 300)),
        "a size of its own": json.dumps(content).encode() + data,
        "deep": b"[" * rng.choice([1_000, 100_000]),
        "deep objects": b'{"prompt":' * rng.choice([1_000, 100_000]),
        "not UTF-8": b'{"prompt": "\xff\xfe"}',
        "half a surrogate": b'{"prompt": "\\ud800"}',
        "twice": b'{"prompt": "a", "prompt": "b", "height": 16, "width": 16, "num_inference_steps": 1}',
        "a number of 100,000 digits": b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
        "shapes": b'{"inputs":[{"name":"prompt","datatype":"BYTES","shape":[99999999999999999999],"data":["a"]}]}',
        "no list": b'{"inputs": {"name": "prompt"}}',
        "data of all kinds": b'{"inputs":[{"name":"prompt","datatype":"BYTES","shape":[1],"data":[{"a":[null]}]}]}',
        "shared memory": b'{"inputs":[{"name":"prompt","datatype":"BYTES","shape":[1],"parameters":'
        b'{"shared_memory_region":"x","shared_memory_byte_size":9,"shared_memory_offset":18446744073709551615}}]}',
    }


def _conversations(rng: random.Random) -> dict[str, bytes]:
    start = f"POST {_INFER} HTTP/1.1\r\nHost: x\r\n".encode()
    return {
        "random": rng.randbytes(500),
        "a length of 2^63": start + b"Content-Length: 9223372036854775807\r\n\r\n{}",
        "a negative length": start + b"Content-Length: -1\r\n\r\n{}",
        "two lengths": start + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
        "length and chunks": start + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "a chunk of 2^64": start + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
        "a long header": start + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        "many headers": start + b"X: a\r\n" * 20_000 + b"\r\n",
        "no end": start + b"Content-Length: 1000\r\n\r\n{",
        "packed": start + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        "a bomb": start + b"Content-Encoding: gzip\r\n" + _gzip_bomb(),
        "gRPC's greeting": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(100),
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(100),
    }


def _gzip_bomb() -> bytes:
    """A small one: of what Triton 24.10 unpacks it does not give all back (see .github/SECURITY.md)."""
    body = gzip.compress(bytes(100_000), 9)
    return b"Content-Length: %d\r\n\r\n" % len(body) + body


def _damaged(rng: random.Random, message: bytes) -> bytes:
    data = bytearray(message)
    for _ in range(rng.randint(1, 5)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return rng.choice([bytes(data), message[: rng.randrange(len(message))], rng.randbytes(rng.randint(0, 300)), b""])
