"""Tensor parallelism of stock models: which slice of which weight a rank has, and what is exchanged for it.

A plan says for each linear layer whether its outputs or its inputs are divided (Megatron-LM, Shoeybi et al. 2019,
arXiv:1909.08053). The vocabulary is that of diffusers' `_tp_plan`, and slices are worked out by diffusers'
code. Weights are plain tensors, smaller than the model's configuration says, and hooks do the communication: with
DTensor weights every layer pays for a dispatch in Python, which at a FLUX step's 400 layers is a good part of the step.
"""

from __future__ import annotations

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
    Literal["colwise", "rowwise", "colwise_gather", "embedding_heads"] | PackedColwiseParallel | PackedRowwiseParallel
)
"""How a layer is divided.

colwise: its outputs; what follows works on a part of them. rowwise: its inputs; partial sums are added up over the
ranks. The packed forms: the same for several projections in one matrix. colwise_gather: its outputs, which are put
together at once: for layers with large weights and small outputs, such as the modulation of adaptive norms.
embedding_heads: the columns of an embedding that has a column a head.
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
    for path, style in plan.items():
        if style == "embedding_heads":
            specs[f"{path}.weight"] = TPShardSpec(1, [model.get_parameter(f"{path}.weight").shape[1]])
        else:
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
    """Hook the layers of `model`, of which this rank has its slices, so that they exchange what they must."""
    for path, style in plan.items():
        for module in find_modules(model, path):
            if style == "rowwise" or isinstance(style, PackedRowwiseParallel):
                module.register_forward_hook(_sum_hook(axis))
            elif style == "colwise_gather":
                module.register_forward_hook(_gather_hook(axis))


def _sum_hook(axis: Axis) -> Callable[..., torch.Tensor]:
    return lambda _, __, output: axis.all_reduce(output)


def _gather_hook(axis: Axis) -> Callable[..., torch.Tensor]:
    return lambda _, __, output: axis.all_gather(output, [output.shape[-1]] * axis.degree, dim=-1)
