"""FLUX.2 over several ranks: by the plans that diffusers' Flux2Transformer2DModel brings along, and Qwen3's."""

from __future__ import annotations

from typing import Any

from diffusers import Flux2Transformer2DModel

from triton_diffusion.distributed.sequence import SequencePlan, plan_from_diffusers
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.families.flux2.family import is_klein
from triton_diffusion.loading.checkpoint import Checkpoint

_QWEN_COLWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_QWEN: dict[str, Style] = {
    **dict.fromkeys((f"model.layers.*.{name}" for name in _QWEN_COLWISE), "colwise"),
    **dict.fromkeys((f"model.layers.*.{name}" for name in ("self_attn.o_proj", "mlp.down_proj")), "rowwise"),
}


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides."""
    plans: dict[str, TensorPlan] = {"transformer": Flux2Transformer2DModel._tp_plan}
    if is_klein(checkpoint):
        plans["text_encoder"] = _QWEN
    return plans


def sequence_plan(transformer: Any) -> SequencePlan:
    """Text and image tokens are cut at the transformer's entrance, and put together behind its last layer."""
    return plan_from_diffusers(transformer, gather_like="hidden_states")
