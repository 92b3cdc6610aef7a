"""Everything that the service and a worker group can tell each other: a closed set, encoded without pickle."""

from __future__ import annotations

import msgspec

from triton_diffusion.config import ParallelConfig, VaeTiling


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of all messages."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """How far a request was, and all that its ranks need to go on from there."""

    done: list[int]
    """Of each row, steps that it has done."""
    state: bytes
    """A safetensors blob for AdmitRequest.checkpoint; only the stage that made it can read it."""


class AdmitRequest(Message, frozen=True, kw_only=True):
    """To the ranks: a request that later ticks will name."""

    request_id: str
    state: bytes
    """A RequestState blob."""
    checkpoint: bytes | None = None
    """Checkpoint.state to go on from; None: from the beginning."""


class RunTick(Message, frozen=True, kw_only=True):
    """To the ranks: run these rows together. Rows of requests that are not here (any more) are passed over."""

    tick_id: int
    rows: list[tuple[str, int]]
    num_steps: int
    alone: bool = True
    """Whether no other replica of the stage has anything to do: idle cores may be used."""


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
    checkpoints: dict[str, Checkpoint] = {}
    """By request id, also of requests that had no row in this tick: a checkpoint is copied behind one tick and handed
    over with the next one."""
    max_batch_tokens: int = 0
    """A smaller limit that was learnt from running out of memory in this tick; 0: none."""
    began_anew: list[str] = []
    """Requests that began with this tick, at their inputs instead of at their checkpoint, which could not be used."""


ToRanks = AdmitRequest | RunTick | DropRequest | Shutdown
FromRanks = GroupReady | TickDone

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
    cores: list[int]
    """Cores of the group that it takes turns on with other groups; empty: it takes none."""
    more_cores: list[int] = []
    """For the rest of its threads, when nobody else wants them."""
    rank: int
    group_size: int
    replica: int
    service_started_s: float
    """time.time() when the service of the stage began; a rank may begin much later, in place of another."""
    max_batch_tokens: int
    """0: measure it."""
    warmup_sizes: list[tuple[int, int]] | None
    """(height, width); None for the checkpoint's default size."""
    checkpoint_steps: int = 0
    """Steps between two checkpoints of a request; 0: none."""
    prompt_cache_bytes: int
    parallel: ParallelConfig
    attention_backend: str
    pack_linears: bool
    vae_tiling: VaeTiling
    run_dir: str
    """Folder of this group alone, made anew at each start; the ranks meet at a file in it."""
    endpoint: str
    """ZMQ endpoint of the service; rank 0 connects to it."""
