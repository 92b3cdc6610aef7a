"""Shard the sequence of a stock diffusers transformer: hooks cut what goes in, and put together what comes out.

Each rank of the sequence axis holds a part of every token stream (image, text), and the model computes on its parts as
if they were all; only attention has to see the others (distributed/attention.py). Streams are cut as equally as can be:
a length that does not divide leaves some ranks one token less, so nothing is padded and no mask is needed for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput

from triton_diffusion.distributed.mesh import Axis, split_sizes


@dataclass(frozen=True)
class Shard:
    """Cut a tensor along `dim`, where it has the tokens of `streams`, one behind the other.

    A tensor of one stream settles how long that stream is; one of several streams, such as a mask over text and image,
    is cut stream by stream, so those lengths must be known by then.
    """

    dim: int
    streams: tuple[str, ...]
    num_dims: int | None = None
    """Leave a tensor of another number of dimensions whole: a model may take a timestep a row or one a token."""


@dataclass(frozen=True)
class Gather:
    """Put a tensor together again along `dim`, where it has the tokens of `stream`."""

    dim: int
    stream: str


@dataclass(frozen=True)
class Leading:
    """An argument that is a number: so many tokens in front of `stream` are special. A rank is told how many it has."""

    stream: str


@dataclass(frozen=True)
class SequencePlan:
    """Where a model is cut. Module paths are those of `get_submodule`, with one "*" for all modules of a list.

    inputs: module path -> name of an argument -> how to cut it. outputs: module path -> how to treat each of its
    outputs, None to leave one alone. whole: paths of modules that work on whole sequences, such as a refiner of the
    text in front of the first cut; their attention is left to the model. cross: paths of attention modules whose keys
    are never cut, such as those of a text that the image tokens attend to; each rank attends with its own queries, and
    asks no other.
    """

    inputs: Mapping[str, Mapping[str, Shard | Leading]]
    outputs: Mapping[str, Sequence[Shard | Gather | None]]
    whole: Sequence[str] = ()
    cross: Sequence[str] = ()


@dataclass
class ShardedSequence:
    """The lengths of the streams in the forward pass that runs, and who holds how much of them."""

    axis: Axis
    lengths: dict[str, int] = field(default_factory=dict)

    @property
    def is_even(self) -> bool:
        """Whether every rank holds equally many tokens of every stream."""
        return all(length % self.axis.degree == 0 for length in self.lengths.values())

    def shard(self, tensor: torch.Tensor, how: Shard) -> torch.Tensor:
        """The part of this rank."""
        if how.num_dims not in (None, tensor.ndim):
            return tensor
        if len(how.streams) == 1:
            self.lengths[how.streams[0]] = tensor.shape[how.dim]
            return self._part(tensor, how.dim)
        lengths = [self.lengths[stream] for stream in how.streams]
        if sum(lengths) != tensor.shape[how.dim]:
            raise ValueError(f"{how.streams} are {lengths} tokens, but dim {how.dim} of {list(tensor.shape)} is not")
        return torch.cat([self._part(part, how.dim) for part in tensor.split(lengths, how.dim)], how.dim)

    def leading(self, count: int, how: Leading) -> int:
        """How many of `count` tokens in front are on this rank."""
        sizes = split_sizes(self.lengths[how.stream], self.axis.degree)
        return min(max(0, count - sum(sizes[: self.axis.rank])), sizes[self.axis.rank])

    def gather(self, tensor: torch.Tensor, how: Gather) -> torch.Tensor:
        """The whole, on every rank."""
        return self.axis.all_gather(tensor, split_sizes(self.lengths[how.stream], self.axis.degree), how.dim)

    def _part(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        sizes = split_sizes(tensor.shape[dim], self.axis.degree)
        return tensor.narrow(dim, sum(sizes[: self.axis.rank]), sizes[self.axis.rank])


def shard_sequence(model: torch.nn.Module, plan: SequencePlan, axis: Axis) -> ShardedSequence:
    """Hook `model` so that each rank of `axis` computes on its part of the sequence."""
    sequence = ShardedSequence(axis)
    for path, arguments in plan.inputs.items():
        for module in find_modules(model, path):
            module.register_forward_pre_hook(_input_hook(module, arguments, sequence), with_kwargs=True)
    for path, outputs in plan.outputs.items():
        for module in find_modules(model, path):
            module.register_forward_hook(_output_hook(outputs, sequence))
    return sequence


def plan_from_diffusers(model: torch.nn.Module, *, gather_like: str) -> SequencePlan:
    """The plan that a diffusers model brings along (`_cp_plan`); its output has the tokens of argument `gather_like`.

    Its own hooks refuse lengths that do not divide, and know one mesh and no masks; the plan itself is what we need.
    """
    inputs: dict[str, dict[str, Shard | Leading]] = {}
    outputs: dict[str, list[Shard | Gather | None]] = {}
    for path, entry in (getattr(model, "_cp_plan", None) or {}).items():
        if not isinstance(entry, Mapping):
            given = entry if isinstance(entry, Sequence) else [entry]
            outputs[path] = [None if each is None else Gather(each.gather_dim, gather_like) for each in given]
            continue
        for name, how in entry.items():
            assert isinstance(how, ContextParallelInput)
            if not how.split_output:
                inputs.setdefault(path, {})[name] = Shard(
                    how.split_dim, (f"{path}.{name}".lstrip("."),), how.expected_dims
                )
                continue
            cut = outputs.setdefault(path, [])
            cut += [None] * (name + 1 - len(cut))
            cut[name] = Shard(how.split_dim, (f"{path}[{name}]",), how.expected_dims)
    return SequencePlan(inputs, outputs)


def find_modules(model: torch.nn.Module, path: str) -> list[torch.nn.Module]:
    """The submodules that `path` names."""
    before, star, behind = path.partition("*")
    if not star:
        return [model.get_submodule(path)]
    modules = model.get_submodule(before.rstrip(".")).children()
    return [module.get_submodule(behind.lstrip(".")) for module in modules]


def _input_hook(
    module: torch.nn.Module, arguments: Mapping[str, Shard | Leading], sequence: ShardedSequence
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    # Streams of their own first: what is made of several needs their lengths.
    ordered = sorted(arguments.items(), key=lambda item: len(item[1].streams) if isinstance(item[1], Shard) else 2)

    def part(value: Any, how: Shard | Leading) -> Any:
        return sequence.leading(value, how) if isinstance(how, Leading) else sequence.shard(value, how)

    def cut(
        _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        changed = list(args)
        for name, how in ordered:
            if name in kwargs:
                if kwargs[name] is not None:
                    kwargs[name] = part(kwargs[name], how)
            elif names.index(name) < len(changed) and changed[names.index(name)] is not None:
                changed[names.index(name)] = part(changed[names.index(name)], how)
        return tuple(changed), kwargs

    return cut


def _output_hook(outputs: Sequence[Shard | Gather | None], sequence: ShardedSequence) -> Callable[..., Any]:
    def treat(_: torch.nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        given = [output] if isinstance(output, torch.Tensor) else list(output)
        for index, how in enumerate(outputs):
            if isinstance(how, Shard):
                given[index] = sequence.shard(given[index], how)
            elif isinstance(how, Gather):
                given[index] = sequence.gather(given[index], how)
        return given[0] if isinstance(output, torch.Tensor) else tuple(given)

    return treat
