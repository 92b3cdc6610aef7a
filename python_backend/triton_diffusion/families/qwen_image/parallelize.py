"""Qwen-Image over several ranks: by the plans that diffusers' QwenImageTransformer2DModel brings along."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImageTransformer2DModel

from triton_diffusion.distributed.sequence import SequencePlan, plan_from_diffusers
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.loading.checkpoint import Checkpoint

# The modulation of the norms has a third of the weights, and diffusers' plan leaves it whole on every rank.
_MODULATION: dict[str, Style] = dict.fromkeys(
    ("transformer_blocks.*.img_mod.1", "transformer_blocks.*.txt_mod.1", "norm_out.linear"), "colwise_gather"
)


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides."""
    return {"transformer": {**QwenImageTransformer2DModel._tp_plan, **_MODULATION}}


def sequence_plan(transformer: Any) -> SequencePlan:
    """Text and image tokens are cut in front of the first block, and put together behind the last layer."""
    return plan_from_diffusers(transformer, gather_like="transformer_blocks.0.hidden_states")
