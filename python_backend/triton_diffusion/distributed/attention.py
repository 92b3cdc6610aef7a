"""Attention over a sequence that is spread over ranks: Ulysses, ring, and both at once (USP).

Ulysses (Jacobs et al. 2023, arXiv:2309.14509): an all-to-all swaps parts of the sequence for parts of the heads, each
rank attends over the whole sequence with some heads, and a second all-to-all swaps back.
Ring (Liu et al. 2023, arXiv:2310.01889): each rank keeps its queries, and keys and values go round; attention over one
part of the keys after the other is merged by the log-sum-exp.
USP (Fang and Zhao 2024, arXiv:2405.07719): Ulysses among ranks with fast links, the ring between such groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from triton_diffusion.attention.backends import Attended, AttentionBackend, AttentionInputs, attend, key_mask
from triton_diffusion.distributed.mesh import Axis, Mesh
from triton_diffusion.distributed.sequence import ShardedSequence

_Lengths = list[tuple[int, int]]
"""(queries, keys) that each rank of the sequence axis holds."""


class ParallelAttention:
    """The attention of one module; a model has one of these for each of its attention modules.

    Every rank of the sequence axis must call it at the same time, with its own part: query (B, Sq, H, D), key and value
    (B, Sk, H, D), and, for a mask, the part of it that is about these keys. H are the heads of this rank, where tensor
    parallelism divides them.
    """

    def __init__(self, backend: AttentionBackend, mesh: Mesh, sequence: ShardedSequence | None) -> None:
        self._backend = backend
        self._ulysses = mesh.ulysses
        self._ring = mesh.ring
        self._axis = mesh.sequence
        self._sequence = sequence
        # By the lengths of the streams: a module is called with the same streams in every forward pass, so that all
        # ranks know them or ask for them together.
        self._known: dict[tuple[tuple[str, int], ...], _Lengths] = {}

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attend; returns this rank's part (B, Sq, H, D)."""
        bias = key_mask(mask, key.shape[1], query.dtype)
        inputs = AttentionInputs(query, key, value, bias, scale)
        if self._axis.degree == 1:
            return self._attend(inputs)[0]
        lengths = self._lengths(query.shape[1], key.shape[1])
        if self._ulysses.degree == 1:
            return self._attend_ring(inputs, [keys for _, keys in lengths])
        degree = self._ulysses.degree
        own = lengths[self._ring.rank * degree :][:degree]
        query_sizes, key_sizes = [queries for queries, _ in own], [keys for _, keys in own]
        if query_sizes == key_sizes and query.shape == key.shape:
            query, key, value = swap_tokens_for_heads((query, key, value), query_sizes, self._ulysses)
        else:
            (query,) = swap_tokens_for_heads((query,), query_sizes, self._ulysses)
            key, value = swap_tokens_for_heads((key, value), key_sizes, self._ulysses)
        if bias is not None:
            bias = self._ulysses.all_gather(bias, key_sizes, dim=3)
        inputs = AttentionInputs(query, key, value, bias, scale)
        if self._ring.degree == 1:
            out, _ = self._attend(inputs)
        else:
            groups = [lengths[start : start + degree] for start in range(0, len(lengths), degree)]
            out = self._attend_ring(inputs, [sum(keys for _, keys in group) for group in groups])
        return swap_heads_for_tokens(out, query_sizes, self._ulysses)

    def _lengths(self, num_queries: int, num_keys: int) -> _Lengths:
        if self._sequence is None or self._sequence.is_even:
            return [(num_queries, num_keys)] * self._axis.degree
        streams = tuple(sorted(self._sequence.lengths.items()))
        if streams not in self._known:
            rows = self._axis.gather_numbers([num_queries, num_keys])
            self._known[streams] = [(queries, keys) for queries, keys in rows]
        return self._known[streams]

    def _attend_ring(self, inputs: AttentionInputs, sizes: Sequence[int]) -> torch.Tensor:
        """sizes: keys of each ring rank."""
        ring, bias = self._ring, inputs.mask
        biases = None if bias is None else ring.all_gather(bias, sizes, dim=3).split(list(sizes), dim=3)
        block = torch.stack((inputs.key, inputs.value))
        merged: tuple[torch.Tensor, torch.Tensor] | None = None
        for turn in range(ring.degree):
            source = (ring.rank - turn) % ring.degree
            works: list[dist.Work] = []
            following = block
            if turn + 1 < ring.degree:
                following = block.new_empty(*block.shape[:2], sizes[(source - 1) % ring.degree], *block.shape[3:])
                works = ring.pass_on(block, following)
            part_bias = None if biases is None else biases[source].contiguous()
            if sizes[source]:
                part = replace(inputs, key=block[0], value=block[1], mask=part_bias)
                merged = merge(merged, self._attend(part, with_lse=True))
            for work in works:
                work.wait()
            block = following
        assert merged is not None
        return merged[0].to(inputs.query.dtype)

    def _attend(self, inputs: AttentionInputs, *, with_lse: bool = False) -> Attended:
        return attend(self._backend, inputs, with_lse=with_lse)


def merge(merged: tuple[torch.Tensor, torch.Tensor] | None, part: Attended) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over some keys and over others to attention over both, in float32.

    Each is (output (B, Sq, H, D), log-sum-exp (B, Sq, H)). With weights exp(lse) / (exp(lse) + exp(lse')), that of the
    new part is sigmoid(lse' - lse).
    """
    out, lse = part
    assert lse is not None
    if merged is None:
        return out.float(), lse
    merged_out, merged_lse = merged
    share = torch.sigmoid(lse - merged_lse).unsqueeze(-1)
    return torch.lerp(merged_out, out.float(), share), torch.logaddexp(merged_lse, lse)


def swap_tokens_for_heads(
    tensors: Sequence[torch.Tensor], sizes: Sequence[int], axis: Axis
) -> tuple[torch.Tensor, ...]:
    """Some tokens with all heads to all tokens with some heads; equal shapes travel in one message.

    tensors: each (B, sizes[rank], H, D). Returns each as (B, sum(sizes), H / degree, D); rank i gets heads
    i * H / degree and those behind it.
    """
    batch, tokens, heads, width = tensors[0].shape
    send = tensors[0].new_empty(axis.degree, tokens, len(tensors), batch, heads // axis.degree, width)
    for index, tensor in enumerate(tensors):
        send[:, :, index] = tensor.unflatten(2, (axis.degree, -1)).permute(2, 1, 0, 3, 4)
    received = axis.all_to_all(send.flatten(0, 1), [tokens] * axis.degree, sizes)
    return tuple(received[:, index].transpose(0, 1) for index in range(len(tensors)))


def swap_heads_for_tokens(tensor: torch.Tensor, sizes: Sequence[int], axis: Axis) -> torch.Tensor:
    """The way back: (B, sum(sizes), H / degree, D) to (B, sizes[rank], H, D)."""
    tokens = sizes[axis.rank]
    received = axis.all_to_all(tensor.transpose(0, 1), sizes, [tokens] * axis.degree)
    swapped: torch.Tensor = received.unflatten(0, (axis.degree, tokens)).permute(2, 1, 0, 3, 4).flatten(2, 3)
    return swapped
