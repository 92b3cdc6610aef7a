"""Decode a picture in tiles, each on another rank.

diffusers' autoencoders can work in overlapping tiles: they call their decoder (or encoder) on one after the other, and
blend the results. Which tiles, and how they are blended, is their business and differs between them. Here their code
runs twice: first with a stand-in that takes note of the tiles, and then, when the ranks have made the tiles, with one
that hands out the results. So every autoencoder with tiles works, and does what it does on one rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_diffusion.config import VaeTiling
from triton_diffusion.distributed.group import RankGroup


class SharedTiles(torch.nn.Module):
    """Stands in for the module that an autoencoder calls on each tile; outside of `run` it is that module."""

    def __init__(self, module: torch.nn.Module, group: RankGroup) -> None:
        super().__init__()
        self.module = module
        self._group = group
        self._forward: Callable[..., torch.Tensor] | None = None
        self._shapes: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}

    def forward(self, tile: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One tile, as the autoencoder calls it."""
        if self._forward is None:
            output: torch.Tensor = self.module(tile, *args, **kwargs)
            return output
        return self._forward(tile, *args, **kwargs)

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `work` returns, which calls the autoencoder and so this module; every rank must call this alike.

        The result counts on rank 0 alone, the others get zeros of its shape. An exception stays on the rank where it
        came up; no other is left waiting.
        """
        if self._group.size == 1:
            return work()
        tiles: list[Callable[[], torch.Tensor]] = []
        sizes: list[torch.Tensor] = []

        def note(tile: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            tiles.append(lambda: self.module(tile, *args, **kwargs))
            sizes.append(self._result_of(tile, *args, **kwargs))
            return torch.zeros_like(sizes[-1], device=tile.device)

        blank = self._with(note, work)
        owners = deal_out([size.numel() for size in sizes], self._group.size)
        made: dict[int, torch.Tensor] | None = None
        try:
            made = {index: tiles[index]() for index, owner in enumerate(owners) if owner == self._group.rank}
        finally:
            all_ok = self._group.all_ok(made is not None)
        if not all_ok:
            return blank
        if not self._group.is_main:
            for result in made.values():
                dist.send(result.contiguous(), 0)
            return blank
        for index, owner in enumerate(owners):
            if owner != 0:
                made[index] = torch.empty_like(sizes[index], device=self._group.device)
                dist.recv(made[index], owner)
        results = iter([made[index] for index in range(len(owners))])
        return self._with(lambda *_, **__: next(results), work)

    def _with(self, forward: Callable[..., torch.Tensor], work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._forward = forward
        try:
            return work()
        finally:
            self._forward = None

    def _result_of(self, tile: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A tensor on meta like what the module makes of `tile`, found without computing it."""
        key = (tile.shape, tile.dtype)
        if key not in self._shapes:
            # The module may write to what it is given, such as the cache of a decoder of videos.
            args, kwargs = copy.deepcopy((args, kwargs))
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = self.module(mode.from_tensor(tile), *args, **kwargs)
            self._shapes[key] = torch.empty(fake.shape, dtype=fake.dtype, device="meta")
        return self._shapes[key]


def share_tiles(vae: Any, group: RankGroup, tiling: VaeTiling) -> None:
    """Switch an autoencoder's tiles on, and share them among the ranks of `group`.

    tiling: "on", "off", or "auto": where there are several ranks, since tiles change a picture a little.
    """
    if tiling == "off" or (tiling == "auto" and group.size == 1):
        return
    vae.enable_tiling()
    vae.decoder = SharedTiles(vae.decoder, group)


def deal_out(sizes: list[int], num_ranks: int) -> list[int]:
    """Who makes each tile: the largest ones first, each to the rank that has least to do."""
    loads = [0] * num_ranks
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners
