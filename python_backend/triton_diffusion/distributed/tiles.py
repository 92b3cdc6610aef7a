"""Decode or encode a picture in tiles, each on another rank.

diffusers' autoencoders can work in overlapping tiles: they call their decoder (or encoder) on one after the other, and
blend the results. Which tiles, and how they are blended, is their business and differs between them. Here their code
runs twice: first with a stand-in that takes note of the tiles, and then, when the ranks have made the tiles, with one
that hands out the results. So every autoencoder with tiles works, and does what it does on one rank.

Autoencoders of videos that are causal in time (Wan, Qwen-Image) go through a tile in several calls, some frames each,
with a cache (`feat_cache`) that the calls of one tile share: those stay together, in their order, on one rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_diffusion.config import VaeTiling
from triton_diffusion.distributed.group import RankGroup

_Result = TypeVar("_Result")
_Forward = Callable[..., torch.Tensor]
_Shapes = tuple[tuple[torch.Size, torch.dtype], ...]
"""Of what the module is called with, call by call."""


@dataclass
class _Call:
    """One call of the module: what it is called with, and a tensor on meta like its result."""

    run: Callable[[], torch.Tensor]
    result: torch.Tensor


@dataclass
class _Tile:
    """The calls that make one tile, in their order."""

    calls: list[_Call] = field(default_factory=list)
    shapes: _Shapes = ()
    rehearsals: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """What the module is called with, but for the cache."""
    num_rehearsed: int = 0
    cache: Any = None
    """Of the rehearsals."""


class SharedTiles(torch.nn.Module):
    """Stands in for the module that an autoencoder calls on each tile; outside of `run` it is that module."""

    def __init__(self, module: torch.nn.Module, group: RankGroup) -> None:
        super().__init__()
        self.module = module
        self._group = group
        self._forward: _Forward | None = None
        self._results: dict[_Shapes, torch.Tensor] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def forward(self, tile: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One tile, or some frames of one, as the autoencoder calls it."""
        if self._forward is None:
            output: torch.Tensor = self.module(tile, *args, **kwargs)
            return output
        return self._forward(tile, *args, **kwargs)

    def run(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns, which calls the autoencoder and so this module; every rank must call this alike.

        The result counts on rank 0 alone, the others get what comes of tiles that are all zeros. An exception stays on
        the rank where it came up; no other is left waiting.
        """
        if self._group.size == 1:
            return work()
        calls: list[_Call] = []
        tiles: dict[int, _Tile] = {}

        def note(tile: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            call = _Call(lambda: self.module(tile, *args, **kwargs), torch.empty(0, device="meta"))
            cache = kwargs.get("feat_cache")
            # By its identity: the calls noted keep it, so that no other can come to have it.
            whole = tiles.setdefault(id(call if cache is None else cache), _Tile())
            call.result = self._rehearse(whole, tile, args, kwargs)
            whole.calls.append(call)
            calls.append(call)
            return torch.zeros_like(call.result, device=tile.device)

        try:
            blank = self._with(note, work)
        except BaseException:
            self._group.all_ok(False)
            raise
        made = self._make(list(tiles.values()), calls)
        if made is None:
            return blank
        results = iter(made)
        return self._with(lambda *_, **__: next(results), work)

    def _make(self, tiles: list[_Tile], calls: list[_Call]) -> list[torch.Tensor] | None:
        """The results of all calls, on rank 0; None on the others, and where a rank has failed."""
        sizes = [sum(call.result.numel() for call in tile.calls) for tile in tiles]
        owners = {
            id(call): owner
            for tile, owner in zip(tiles, deal_out(sizes, self._group.size), strict=True)
            for call in tile.calls
        }
        made: dict[int, torch.Tensor] | None = None
        try:
            made = {id(call): call.run() for call in calls if owners[id(call)] == self._group.rank}
        finally:
            all_ok = self._group.all_ok(made is not None)
        if not all_ok:
            return None
        if not self._group.is_main:
            for result in made.values():
                dist.send(result.contiguous(), 0)
            return None
        for call in calls:
            if owners[id(call)] != 0:
                made[id(call)] = torch.empty_like(call.result, device=self._group.device)
                dist.recv(made[id(call)], owners[id(call)])
        return [made[id(call)] for call in calls]

    def _with(self, forward: _Forward, work: Callable[[], _Result]) -> _Result:
        self._forward = forward
        try:
            return work()
        finally:
            self._forward = None

    def _rehearse(self, whole: _Tile, tile: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """A tensor on meta like what the module makes of `tile` behind the calls before, found without computing it."""
        # The module writes to what it is given.
        args, kwargs = copy.deepcopy((args, kwargs))
        cache = kwargs.pop("feat_cache", None)
        if not whole.rehearsals:
            whole.cache = cache
        whole.rehearsals.append((tile, args, kwargs))
        whole.shapes += ((tile.shape, tile.dtype),)
        if whole.shapes not in self._results:
            with self._fake as mode:
                for tensor, positional, named in whole.rehearsals[whole.num_rehearsed :]:
                    shared = {} if whole.cache is None else {"feat_cache": whole.cache}
                    fake = self.module(mode.from_tensor(tensor), *positional, **named, **shared)
            whole.num_rehearsed = len(whole.rehearsals)
            self._results[whole.shapes] = torch.empty(fake.shape, dtype=fake.dtype, device="meta")
        return self._results[whole.shapes]


def share_tiles(vae: Any, group: RankGroup, tiling: VaeTiling) -> None:
    """Switch an autoencoder's tiles on, and share them among the ranks of `group`, of decoding and of encoding.

    tiling: "on", "off", or "auto": where there are several ranks, since tiles change a picture a little.
    """
    if tiling == "off" or (tiling == "auto" and group.size == 1):
        return
    vae.enable_tiling()
    for name in ("decoder", "encoder"):
        setattr(vae, name, SharedTiles(getattr(vae, name), group))


def deal_out(sizes: list[int], num_ranks: int) -> list[int]:
    """Who makes each tile: the largest ones first, each to the rank that has least to do."""
    loads = [0] * num_ranks
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners
