"""FLUX over several ranks: by the plans that diffusers' FluxTransformer2DModel brings along, and T5's."""

from __future__ import annotations

from typing import Any

from diffusers import FluxTransformer2DModel

from triton_diffusion.distributed.sequence import SequencePlan, plan_from_diffusers
from triton_diffusion.distributed.t5 import t5_tensor_plan
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.loading.checkpoint import Checkpoint

# The modulation of the norms has over a quarter of the weights, and diffusers' plan leaves it whole on every rank.
_MODULATION: dict[str, Style] = dict.fromkeys(
    (
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "single_transformer_blocks.*.norm.linear",
        "norm_out.linear",
    ),
    "colwise_gather",
)


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides."""
    return {
        "transformer": {**FluxTransformer2DModel._tp_plan, **_MODULATION},
        "text_encoder_2": t5_tensor_plan(checkpoint.config("text_encoder_2")),
    }


def sequence_plan(transformer: Any) -> SequencePlan:
    """Text and image tokens are cut at the transformer's entrance, and put together behind its last layer."""
    return plan_from_diffusers(transformer, gather_like="hidden_states")
