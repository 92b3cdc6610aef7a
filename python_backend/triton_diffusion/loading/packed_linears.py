"""Linear layers of a model on the CPU, in the layout of oneDNN, and with the GELU that follows them in one operator.

F.linear brings the weight into that layout at every call, which is most of what a small batch costs; and torch's GELU
takes half as long as the matrix product before it. Both are what torch.compile does on a CPU with frozen weights
(pytorch, torch/_inductor/fx_passes/mkldnn_fusion.py), without its minutes of compiling and without a compiler.
"""

from __future__ import annotations

import logging
from typing import TypeGuard

import torch
from diffusers.models.activations import GELU

logger = logging.getLogger(__name__)

# A module that has a layer and its activation side by side, as the single blocks of FLUX, HunyuanVideo and others.
_SIDE_BY_SIDE = ("proj_mlp", "act_mlp")


class PackedLinear(torch.nn.Module):
    """A `torch.nn.Linear` in bfloat16 on the CPU, for inference.

    Without GELU it gives what torch gives for contiguous inputs (with AVX512-BF16 to the bit). With it, GELU takes the
    sum as it is, in float32, where torch rounds it to bfloat16 before: one rounding where there were two.
    """

    def __init__(self, linear: torch.nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # The layout is opaque, but the weight still tells its dtype and its device to those who ask.
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()))
        self.bias = linear.bias
        self._activation = ("gelu", "tanh") if gelu else ("none", "")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs`: (..., in_features) in bfloat16. Returns (..., out_features)."""
        name, algorithm = self._activation
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, name, [], algorithm)
        return output


def can_pack() -> bool:
    """Whether this processor computes bfloat16 by oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_for_cpu(model: torch.nn.Module) -> None:
    """Replace the linear layers of `model` that are in bfloat16 on a CPU, if it `can_pack`.

    Layers with hooks stay as they are, such as those that exchange partial sums in tensor parallelism. A weight that
    was mapped from its file is afterwards the process's own.
    """
    if not can_pack():
        return
    num_packed = _pack_children(model)
    if num_packed:
        logger.info("packed %d linear layers of %s for the CPU", num_packed, type(model).__name__)


def _pack_children(module: torch.nn.Module) -> int:
    linear_name, activation_name = _SIDE_BY_SIDE
    activation = getattr(module, activation_name, None)
    if (
        isinstance(activation, torch.nn.GELU)
        and _is_tanh_gelu(activation)
        and _can_be_packed(linear := getattr(module, linear_name, None))
    ):
        setattr(module, linear_name, PackedLinear(linear, gelu=True))
        setattr(module, activation_name, torch.nn.Identity())
    num_packed = 0
    for name, child in list(module.named_children()):
        if isinstance(child, GELU) and _is_tanh_gelu(child) and _can_be_packed(child.proj):
            child = PackedLinear(child.proj, gelu=True)
        elif _can_be_packed(child):
            child = PackedLinear(child)
        setattr(module, name, child)
        num_packed += 1 if isinstance(child, PackedLinear) else _pack_children(child)
    return num_packed


def _is_tanh_gelu(activation: torch.nn.GELU | GELU) -> bool:
    return activation.approximate == "tanh" and not _is_hooked(activation)


def _can_be_packed(module: object) -> TypeGuard[torch.nn.Linear]:
    if type(module) is not torch.nn.Linear or _is_hooked(module):
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.bfloat16


def _is_hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
