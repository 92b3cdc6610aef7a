"""Everything that the service and a worker group can tell each other: a closed set, encoded without pickle."""

from __future__ import annotations

import msgspec

from triton_diffusion.config import ParallelConfig, VaeTiling


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of all messages."""


class AdmitRequest(Message, frozen=True, kw_only=True):
    """To the ranks: a request that later ticks will name."""

    request_id: str
    state: bytes
    """A RequestState blob."""


class RunTick(Message, frozen=True, kw_only=True):
    """To the ranks: run these rows together. Rows of requests that are not here (any more) are passed over."""

    tick_id: int
    rows: list[tuple[str, int]]
    num_steps: int


class DropRequest(Message, frozen=True, kw_only=True):
    """To the ranks: forget a request, it was cancelled."""

    request_id: str


class Shutdown(Message, frozen=True, kw_only=True):
    """To the ranks: end."""


class GroupReady(Message, frozen=True, kw_only=True):
    """From rank 0: every rank has loaded its components."""

    device: str
    dtype: str
    load_s: float
    max_batch_tokens: int
    measurements: list[tuple[int, float]]
    """(tokens in the batch, seconds of the tick); empty where nothing was measured."""


class GroupFailed(Message, frozen=True, kw_only=True):
    """From rank 0: a rank could not load; the group ends itself."""

    message: str


class TickDone(Message, frozen=True, kw_only=True):
    """From rank 0: a tick is through on all ranks."""

    tick_id: int
    duration_s: float
    failed: dict[str, tuple[str, str]]
    """By request id: class name and message of the error (errors.to_wire)."""
    results: dict[str, bytes]
    """By request id: RequestState blob of requests whose last row is through."""
    previews: dict[str, bytes]
    """By request id: RequestState blob for the decoding stage that shows the request as it stands."""
    counts: dict[str, int]
    """What the stage has counted since the last tick, by the name of a field of StageMetrics."""


ToRanks = AdmitRequest | RunTick | DropRequest | Shutdown
FromRanks = GroupReady | GroupFailed | TickDone

_encoder = msgspec.msgpack.Encoder()
_to_ranks: msgspec.msgpack.Decoder[ToRanks] = msgspec.msgpack.Decoder(ToRanks)
_from_ranks: msgspec.msgpack.Decoder[FromRanks] = msgspec.msgpack.Decoder(FromRanks)


def encode(message: Message) -> bytes:
    """The message as msgpack."""
    return _encoder.encode(message)


def decode_to_ranks(data: bytes) -> ToRanks:
    """A message for the ranks; raises msgspec.ValidationError."""
    return _to_ranks.decode(data)


def decode_from_ranks(data: bytes) -> FromRanks:
    """A message from rank 0; raises msgspec.ValidationError."""
    return _from_ranks.decode(data)


class RankLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """The one line on a rank's standard input: all it needs to know to start."""

    stage_model: str
    model_path: str
    dtype: str
    num_threads: int
    rank: int
    group_size: int
    replica: int
    max_batch_tokens: int
    """0: measure it."""
    warmup_sizes: list[tuple[int, int]] | None
    """(height, width); None for the checkpoint's default size."""
    prompt_cache_bytes: int
    parallel: ParallelConfig
    attention_backend: str
    vae_tiling: VaeTiling
    run_dir: str
    endpoint: str
    """ZMQ endpoint of the service; rank 0 connects to it."""
    store_port: int
    """Loopback port of the store that the ranks meet at."""
    store_fd: int
    """The listening socket of that port; rank 0 has inherited it."""
