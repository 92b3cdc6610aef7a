"""LTX-Video over several ranks: the sequence of video tokens, the heads of both attentions, and T5."""

from __future__ import annotations

from typing import Any

from triton_diffusion.distributed.sequence import Gather, SequencePlan, Shard
from triton_diffusion.distributed.t5 import t5_tensor_plan
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.loading.checkpoint import Checkpoint

_BLOCKS = "transformer_blocks"
_VIDEO = ("hidden_states",)


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """Queries and keys are normalised, and rotated, before the heads are told apart."""
    transformer: dict[str, Style] = {
        f"{_BLOCKS}.*.ff.net.0.proj": "colwise",
        f"{_BLOCKS}.*.ff.net.2": "rowwise",
        "rope": "part_of_heads",
        "time_embed.linear": "colwise_gather",
    }
    for attention in ("attn1", "attn2"):
        prefix = f"{_BLOCKS}.*.{attention}"
        transformer |= dict.fromkeys((f"{prefix}.{name}" for name in ("to_q", "to_k", "to_v")), "colwise")
        transformer |= dict.fromkeys((f"{prefix}.{name}" for name in ("norm_q", "norm_k")), "norm_over_heads")
        transformer[f"{prefix}.to_out.0"] = "rowwise"
    return {"transformer": transformer, "text_encoder": t5_tensor_plan(checkpoint.config("text_encoder"))}


def sequence_plan(transformer: Any) -> SequencePlan:
    """Video tokens are cut at the transformer's entrance, with their positions and, if there is one a token, timesteps.

    Every rank has the whole text, and its own tokens attend to that; the model does so by itself, with its mask that
    has a copy for every head.
    """
    return SequencePlan(
        inputs={"": {"hidden_states": Shard(1, _VIDEO, 3), "timestep": Shard(1, _VIDEO, 2)}},
        outputs={"rope": [Shard(1, _VIDEO, 3)] * 2, "proj_out": [Gather(1, *_VIDEO)]},
        whole=[f"{_BLOCKS}.{index}.attn2" for index in range(len(transformer.transformer_blocks))],
    )
