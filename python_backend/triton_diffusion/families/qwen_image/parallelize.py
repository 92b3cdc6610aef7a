"""Qwen-Image over several ranks: by the plans of diffusers' QwenImageTransformer2DModel, and one for Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImageTransformer2DModel
from diffusers.hooks.tensor_parallel import PackedColwiseParallel

from triton_diffusion.distributed.language_model import language_model_plan
from triton_diffusion.distributed.sequence import SequencePlan, plan_from_diffusers
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.loading.checkpoint import Checkpoint

# The modulation of the norms has a third of the weights, and diffusers' plan leaves it whole on every rank.
_MODULATION: dict[str, Style] = dict.fromkeys(
    ("transformer_blocks.*.img_mod.1", "transformer_blocks.*.txt_mod.1", "norm_out.linear"), "colwise_gather"
)
_VISION_BLOCK, _MERGER = "model.visual.blocks.*", "model.visual.merger.mlp"
_VISION: dict[str, Style] = {
    f"{_VISION_BLOCK}.attn.qkv": PackedColwiseParallel([1, 1, 1]),
    **dict.fromkeys((f"{_VISION_BLOCK}.mlp.{name}_proj" for name in ("gate", "up")), "colwise"),
    **dict.fromkeys((f"{_VISION_BLOCK}.{name}" for name in ("attn.proj", "mlp.down_proj")), "rowwise"),
    f"{_MERGER}.0": "colwise",
    f"{_MERGER}.2": "rowwise",
}


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides."""
    return {
        "transformer": {**QwenImageTransformer2DModel._tp_plan, **_MODULATION},
        "text_encoder": {**language_model_plan("model.language_model", head="lm_head"), **_VISION},
    }


def sequence_plan(transformer: Any) -> SequencePlan:
    """Text and image tokens are cut in front of the first block, and put together behind the last layer."""
    return plan_from_diffusers(transformer, gather_like="transformer_blocks.0.hidden_states")
