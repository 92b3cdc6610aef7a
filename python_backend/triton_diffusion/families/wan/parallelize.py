"""Wan over several ranks: the sequence of image tokens, the heads of both attentions, and UMT5."""

from __future__ import annotations

import dataclasses
from typing import Any

from triton_diffusion.distributed.sequence import SequencePlan, plan_from_diffusers
from triton_diffusion.distributed.t5 import t5_tensor_plan
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.loading.checkpoint import Checkpoint

_SELF, _CROSS, _FEED_FORWARD = "blocks.*.attn1", "blocks.*.attn2", "blocks.*.ffn.net"
# UMT5 is T5 with a position bias in every block.
_POSITION_BIAS = "encoder.block.*.layer.0.SelfAttention.relative_attention_bias"


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides; the transformers of Wan 2.2 are alike."""
    attends_to_pictures = checkpoint.config("transformer").get("added_kv_proj_dim") is not None
    transformer = _transformer_plan(attends_to_pictures=attends_to_pictures)
    text_encoder = t5_tensor_plan(checkpoint.config("text_encoder"))
    return {
        "transformer": transformer,
        "transformer_2": transformer,
        "text_encoder": {**text_encoder, _POSITION_BIAS: "embedding_heads"},
    }


def sequence_plan(transformer: Any) -> SequencePlan:
    """Image tokens are cut in front of the first block, with timesteps that are one a token.

    Every rank has the whole text, and its own tokens attend to that.
    """
    plan = plan_from_diffusers(transformer, gather_like="blocks.0.hidden_states")
    return dataclasses.replace(plan, cross=[_CROSS])


def _transformer_plan(*, attends_to_pictures: bool) -> TensorPlan:
    """The text's keys and values are divided by heads as well; queries and keys are normalised over all heads."""
    plan: dict[str, Style] = {f"{_FEED_FORWARD}.0.proj": "colwise", f"{_FEED_FORWARD}.2": "rowwise"}
    for attention in (_SELF, _CROSS):
        plan |= dict.fromkeys((f"{attention}.{name}" for name in ("to_q", "to_k", "to_v")), "colwise")
        plan |= dict.fromkeys((f"{attention}.{name}" for name in ("norm_q", "norm_k")), "norm_over_heads")
        plan[f"{attention}.to_out.0"] = "rowwise"
    if attends_to_pictures:
        plan |= dict.fromkeys((f"{_CROSS}.{name}" for name in ("add_k_proj", "add_v_proj")), "colwise")
        plan[f"{_CROSS}.norm_added_k"] = "norm_over_heads"
    return plan
