"""The ranks of one worker group: what rank 0 hears, all hear; what fails on one rank, fails on all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from triton_diffusion.config import ParallelConfig
from triton_diffusion.distributed.mesh import Mesh, make_mesh
from triton_diffusion.errors import DiffusionError, ResourceExhaustedError, from_wire, to_wire

# Ranks wait in a broadcast while the server is idle. A peer that dies is noticed by its process handle, not by this.
_IDLE_TIMEOUT = timedelta(days=365)
# Most messages (a tick of a few rows) travel with their length in one broadcast of this size.
_INLINE_BYTES = 4096
_LENGTH_BYTES = 8

RANKS_TIMEOUT_S = 30.0
"""How long a rank that has failed waits for the others, which may have failed alike a little later."""

Failures = Mapping[str, BaseException]
"""Exceptions by request id."""


class RanksDivergedError(RuntimeError):
    """Ranks of a group are at different places in their work, and cannot get together again."""


class RankGroup:
    """A process as a rank of its group.

    Control traffic goes over gloo on every device; a group of one rank never touches torch.distributed.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        device: torch.device,
        store: Store | None = None,
        parallel: ParallelConfig | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.parallel = parallel or ParallelConfig()
        self.mesh = Mesh()
        """The axes along which the ranks share a model; none where they all do the same."""
        if size > 1:
            assert store is not None
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_IDLE_TIMEOUT)
            self._control = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
            self.mesh = make_mesh(self.parallel, device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which talks to the scheduler."""
        return self.rank == 0

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank; the others pass None. Every rank must call this."""
        if self.size == 1:
            assert data is not None
            return data
        buffer = torch.zeros(_INLINE_BYTES, dtype=torch.uint8)
        if data is not None:
            inline = data[: _INLINE_BYTES - _LENGTH_BYTES]
            head = len(data).to_bytes(_LENGTH_BYTES, "little") + inline
            buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=self._control)
        received = bytes(buffer.numpy())
        length = int.from_bytes(received[:_LENGTH_BYTES], "little")
        inline = received[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(inline) == length:
            return inline
        rest = torch.empty(length - len(inline), dtype=torch.uint8)
        if data is not None:
            rest.copy_(torch.frombuffer(bytearray(data[len(inline) :]), dtype=torch.uint8))
        dist.broadcast(rest, 0, group=self._control)
        return inline + bytes(rest.numpy())

    def agree(self, failures: Failures) -> dict[str, DiffusionError]:
        """The failures of all ranks, equal on all ranks. Every rank must call this.

        So no rank goes on with a request that another rank has given up.

        An exception on some ranks only, in the middle of a forward pass, leaves the others in a collective of that
        pass: they cannot come here, and nothing but a new start helps. A rank that has failed therefore waits for the
        others no longer than RANKS_TIMEOUT_S, and then raises RanksDivergedError, of which its process shall end.
        """
        own = {request_id: to_wire(error) for request_id, error in failures.items()}
        if self.size == 1:
            return {request_id: from_wire(*wire) for request_id, wire in own.items()}
        encoded = json.dumps({key: [name, f"rank {self.rank}: {text}"] for key, (name, text) in own.items()}).encode()
        length = torch.tensor([len(encoded) if own else 0])
        work = dist.all_reduce(length, dist.ReduceOp.MAX, group=self._control, async_op=True)
        self._wait(work, failures)
        if not length.item():
            return {}
        padded = torch.zeros(int(length.item()), dtype=torch.uint8)
        if own:
            padded[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self._control)
        merged: dict[str, DiffusionError] = {}
        for part in gathered:
            text = bytes(part.numpy()).rstrip(b"\0")
            for request_id, (name, message) in json.loads(text or b"{}").items():
                error = from_wire(name, message)
                # What ran out of memory is tried again with less: that counts, whatever it has caused on other ranks.
                if request_id not in merged or isinstance(error, ResourceExhaustedError):
                    merged[request_id] = error
        return merged

    def all_ok(self, ok: bool) -> bool:
        """Whether `ok` holds on every rank; asked before a collective that a failed rank would not enter."""
        if self.size == 1:
            return ok
        flag = torch.tensor([int(ok)])
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._control)
        return bool(flag.item())

    def _wait(self, work: dist.Work, failures: Failures) -> None:
        if not failures:
            work.wait()
            return
        try:
            work.wait(timedelta(seconds=RANKS_TIMEOUT_S))
        except RuntimeError as error:
            texts = "; ".join(str(failure) for failure in failures.values())
            raise RanksDivergedError(
                f"rank {self.rank} failed alone ({texts}), and the other ranks wait for it in the middle of their work"
            ) from error

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()
