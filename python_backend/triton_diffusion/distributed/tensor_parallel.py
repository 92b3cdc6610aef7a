"""Tensor parallelism of stock models: which slice of which weight a rank has, and what is exchanged for it.

A plan says for each linear layer whether its outputs or its inputs are divided (Megatron-LM, Shoeybi et al. 2019,
arXiv:1909.08053). The vocabulary is that of diffusers' `_tp_plan`, and slices are worked out by diffusers'
code. Weights are plain tensors, smaller than the model's configuration says, and hooks do the communication: with
DTensor weights every layer pays for a dispatch in Python, which at a FLUX step's 400 layers is a good part of the step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from diffusers.hooks.tensor_parallel import (
    PackedColwiseParallel,
    PackedRowwiseParallel,
    TPShardSpec,
    resolve_tp_shard_specs,
)

from triton_diffusion.distributed.mesh import Axis
from triton_diffusion.distributed.sequence import find_modules
from triton_diffusion.errors import ConfigurationError

Style = (
    Literal[
        "colwise",
        "rowwise",
        "colwise_gather",
        "embedding_gather",
        "embedding_heads",
        "norm_over_heads",
        "part_of_heads",
    ]
    | PackedColwiseParallel
    | PackedRowwiseParallel
)
"""How a layer is divided.

colwise: its outputs; what follows works on a part of them. rowwise: its inputs; partial sums are added up over the
ranks. The packed forms: the same for several projections in one matrix. colwise_gather: its outputs, which are put
together at once: for layers with large weights and small outputs, such as the modulation of adaptive norms.
embedding_gather: the columns of an embedding, put together at once. embedding_heads: the columns of an embedding that
has a column a head. norm_over_heads: an RMSNorm of queries or keys that takes all heads as one; each rank has the
weights of its heads, and the mean square is that of all ranks. part_of_heads: a module without weights, of whose
outputs (..., width of all heads) each rank needs the part of its heads: rotary embeddings that are applied before the
heads are told apart.
"""


TensorPlan = Mapping[str, Style]
"""Which layers of a model are divided: by module path, with one "*" for all modules of a list."""


def shard_specs(model: torch.nn.Module, plan: TensorPlan, tp_size: int) -> dict[str, TPShardSpec]:
    """For each parameter that is divided, or whose bias must not be added twice, how; `model` may be on meta.

    Raises:
        ConfigurationError: a dimension does not divide.
    """
    linear: dict[str, Any] = {}
    specs: dict[str, TPShardSpec] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for path, style in plan.items():
        if style in ("embedding_gather", "embedding_heads", "norm_over_heads"):
            dim = 0 if style == "norm_over_heads" else 1
            for module in find_modules(model, path):
                size = module.get_parameter("weight").shape[dim]
                if size % tp_size:
                    raise ConfigurationError(
                        f"tp_size={tp_size} does not divide {path} of {type(model).__name__}: {size}"
                    )
                specs[f"{names[id(module)]}.weight"] = TPShardSpec(dim, [size])
        elif style != "part_of_heads":
            linear[path] = "colwise" if style == "colwise_gather" else style
    try:
        specs |= resolve_tp_shard_specs(model, linear, tp_size)
    except ValueError as error:
        raise ConfigurationError(f"tp_size={tp_size} does not fit {type(model).__name__}: {error}") from error
    return specs


def local_slice(tensor: Any, spec: TPShardSpec, axis: Axis) -> torch.Tensor:
    """Cut out the part of this rank from a tensor, or from a safetensors slice, of which then only that part is read.

    A bias that is added to a sum over all ranks is kept by rank 0 and is zero on the others.
    """
    if spec.dim is None:
        whole: torch.Tensor = tensor[:]
        return whole if axis.rank == 0 else torch.zeros_like(whole)
    parts, start = [], 0
    assert spec.block_sizes is not None
    for size in spec.block_sizes:
        chunk = size // axis.degree
        begin = start + axis.rank * chunk
        parts.append(tensor[begin : begin + chunk] if spec.dim == 0 else tensor[:, begin : begin + chunk])
        start += size
    return (parts[0] if len(parts) == 1 else torch.cat(parts, spec.dim)).contiguous()


def add_communication(model: torch.nn.Module, plan: TensorPlan, axis: Axis) -> None:
    """Hook the layers of `model`, of which this rank has its slices, so that they exchange what they must.

    Attention divides what its projections make into heads, and so must know how many are here.
    """
    for path, style in plan.items():
        before, _, name = path.rpartition(".")
        if name in _HEAD_COUNTS and (style == "colwise" or isinstance(style, PackedColwiseParallel)):
            for attention in find_modules(model, before):
                for count in _HEAD_COUNTS[name]:
                    if hasattr(attention, count):
                        setattr(attention, count, getattr(attention, count) // axis.degree)
        for module in find_modules(model, path):
            if style == "rowwise" or isinstance(style, PackedRowwiseParallel):
                module.register_forward_hook(_sum_hook(axis))
            elif style in ("colwise_gather", "embedding_gather"):
                module.register_forward_hook(_gather_hook(axis))
            elif style == "part_of_heads":
                module.register_forward_hook(_part_hook(axis))
            elif style == "norm_over_heads":
                module.forward = functools.partial(_norm_over_heads, module, axis)


# By the name of the query's projection, in diffusers, in transformers' T5 and UMT5, and in what Qwen2.5-VL sees
# pictures by. inner_dim / heads is how Qwen-Image's attention finds the size of a head.
_HEAD_COUNTS = {"to_q": ("heads", "inner_dim"), "q": ("n_heads",), "qkv": ("num_heads",)}


def _norm_over_heads(norm: Any, axis: Axis, states: torch.Tensor) -> torch.Tensor:
    """In float32, as torch computes it (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4)."""
    wide = states.float()
    mean_square = axis.all_reduce(wide.square().mean(-1, keepdim=True)) / axis.degree
    normed: torch.Tensor = wide * torch.rsqrt(mean_square + norm.eps) * norm.weight
    return normed.to(states.dtype)


def _sum_hook(axis: Axis) -> Callable[..., torch.Tensor]:
    return lambda _, __, output: axis.all_reduce(output)


def _gather_hook(axis: Axis) -> Callable[..., torch.Tensor]:
    return lambda _, __, output: axis.all_gather(output, [output.shape[-1]] * axis.degree, dim=-1)


def _part_hook(axis: Axis) -> Callable[..., tuple[torch.Tensor, ...]]:
    return lambda _, __, outputs: tuple(output.chunk(axis.degree, dim=-1)[axis.rank] for output in outputs)
