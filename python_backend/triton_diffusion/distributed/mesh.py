"""The mesh of a worker group: which ranks share what, with one process group an axis, made once and handed down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from triton_diffusion.config import ParallelConfig


@dataclass
class Traffic:
    """What this rank has sent over an axis."""

    sent_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        """Count one collective."""
        self.sent_bytes += num_bytes


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, as this rank sees it; every rank of the axis must make the same calls in the same order.

    An axis of degree 1 has no process group, and its collectives return what they are given.
    """

    degree: int = 1
    rank: int = 0
    """The place of this rank on the axis, 0 .. degree - 1."""
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def all_to_all(self, tensor: torch.Tensor, in_sizes: Sequence[int], out_sizes: Sequence[int]) -> torch.Tensor:
        """Send in_sizes[i] rows of `tensor` (N, ...) to rank i, and get out_sizes[i] rows from it, in order of rank."""
        received = tensor.new_empty(sum(out_sizes), *tensor.shape[1:])
        dist.all_to_all_single(received, tensor.contiguous(), list(out_sizes), list(in_sizes), group=self.group)
        self.traffic.add(_size(tensor) - _size(tensor) // max(1, tensor.shape[0]) * in_sizes[self.rank])
        return received

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int], dim: int) -> torch.Tensor:
        """The parts of all ranks side by side along `dim`; rank i has sizes[i] there."""
        if self.degree == 1:
            return tensor
        longest = max(sizes)
        # Neither gloo nor NCCL gathers parts of different size in one go.
        padded = _pad(tensor.movedim(dim, 0), longest)
        gathered = padded.new_empty(self.degree * longest, *padded.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        self.traffic.add((self.degree - 1) * _size(padded))
        if min(sizes) < longest:
            parts = gathered.split(longest)
            gathered = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return gathered.movedim(0, dim)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; the same to the bit on all of them."""
        if self.degree == 1:
            return tensor
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        # A ring all-reduce sends every part twice, but for the one that starts here.
        self.traffic.add(2 * (self.degree - 1) * _size(tensor) // self.degree)
        return tensor

    def pass_on(self, tensor: torch.Tensor, received: torch.Tensor) -> list[dist.Work]:
        """Begin to send `tensor` to the next rank and to receive into `received` from the one before."""
        following, previous = (self.rank + 1) % self.degree, (self.rank - 1) % self.degree
        works: list[dist.Work] = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, group=self.group, group_peer=following),
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=previous),
            ]
        )
        self.traffic.add(_size(tensor))
        return works

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank, in order of rank."""
        if self.degree == 1:
            return [list(numbers)]
        assert self.group is not None
        device = "cpu" if dist.get_backend(self.group) == "gloo" else "cuda"
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        gathered = own.new_empty(self.degree * len(numbers))
        dist.all_gather_into_tensor(gathered, own, group=self.group)
        rows: list[list[int]] = gathered.view(self.degree, -1).tolist()
        return rows


@dataclass(frozen=True)
class Mesh:
    """The axes of a worker group, from slow links to fast ones; `sequence` is ring and ulysses taken as one."""

    cfg: Axis = field(default_factory=Axis)
    ring: Axis = field(default_factory=Axis)
    ulysses: Axis = field(default_factory=Axis)
    tp: Axis = field(default_factory=Axis)
    sequence: Axis = field(default_factory=Axis)

    @property
    def axes(self) -> dict[str, Axis]:
        """By name, those that have more than one rank; `sequence` only where both of its axes have."""
        axes = {"cfg": self.cfg, "ring": self.ring, "ulysses": self.ulysses, "tp": self.tp}
        if self.sequence not in (self.ring, self.ulysses):
            axes["sequence"] = self.sequence
        return {name: axis for name, axis in axes.items() if axis.degree > 1}


def make_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """The mesh of all ranks of this process group; every rank must call this, once."""
    if parallel.num_ranks == 1:
        return Mesh()
    degrees = {"cfg": parallel.cfg, "ring": parallel.ring, "ulysses": parallel.ulysses, "tp": parallel.tp}
    device_mesh = init_device_mesh(device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
    axes = {
        name: Axis(degree, device_mesh.get_local_rank(name), device_mesh.get_group(name))
        for name, degree in degrees.items()
        if degree > 1
    }
    match parallel.ring > 1, parallel.ulysses > 1:
        case True, True:
            flat = device_mesh["ring", "ulysses"]._flatten("sequence")
            axes["sequence"] = Axis(parallel.sequence, flat.get_local_rank(), flat.get_group())
        case True, False:
            axes["sequence"] = axes["ring"]
        case False, True:
            axes["sequence"] = axes["ulysses"]
    return Mesh(**axes)


def split_sizes(total: int, degree: int) -> list[int]:
    """How many of `total` each of `degree` ranks gets: as equal as can be, the first ones get one more."""
    return [total // degree + (rank < total % degree) for rank in range(degree)]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pad(tensor: torch.Tensor, length: int) -> torch.Tensor:
    if len(tensor) == length:
        return tensor.contiguous()
    padded = tensor.new_zeros(length, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded
