"""GLM-Image over several ranks: diffusers brings no plans for its transformer, so these are ours."""

from __future__ import annotations

from typing import Any

from triton_diffusion.distributed.sequence import Gather, SequencePlan, Shard
from triton_diffusion.distributed.t5 import t5_tensor_plan
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.families.glm_image.attention import GlmImageAttention
from triton_diffusion.families.glm_image.family import MAX_IMAGES
from triton_diffusion.loading.checkpoint import Checkpoint

_BLOCK = "transformer_blocks.*"
_TRANSFORMER: dict[str, Style] = {
    **dict.fromkeys((f"{_BLOCK}.attn1.to_{name}" for name in "qkv"), "colwise"),
    f"{_BLOCK}.attn1.to_out.0": "rowwise",
    f"{_BLOCK}.norm1.linear": "colwise_gather",
    "norm_out.linear": "colwise_gather",
    **dict.fromkeys(
        (f"{path}.net.0.proj" for path in (f"{_BLOCK}.ff", "glyph_projector", "prior_projector")), "colwise"
    ),
    **dict.fromkeys((f"{path}.net.2" for path in (f"{_BLOCK}.ff", "glyph_projector", "prior_projector")), "rowwise"),
}

_IMAGE, _TEXT = ("image",), ("text",)


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides."""
    return {"transformer": _TRANSFORMER, "text_encoder": t5_tensor_plan(checkpoint.config("text_encoder"))}


def sequence_plan(transformer: Any) -> SequencePlan:
    """Image and text are cut in front of the first block, and the image is put together behind the last layer.

    Each condition picture is a stream of its own: its keys stay where they were made, with their part of the picture.
    """
    pictures = {f"picture_{index}": Shard(1, (f"picture_{index}",)) for index in range(MAX_IMAGES)}
    return SequencePlan(
        inputs={
            "transformer_blocks.0": {"hidden_states": Shard(1, _IMAGE), "encoder_hidden_states": Shard(1, _TEXT)},
            _BLOCK: {"attention_mask": Shard(1, _TEXT)},
            f"{_BLOCK}.attn1": pictures,
        },
        outputs={"rope": [Shard(0, _IMAGE), Shard(0, _IMAGE)], "proj_out": [Gather(1, "image")]},
    )


def set_attention_processors(transformer: Any) -> None:
    """Attention that takes a mask over keys, and so can be shared among ranks."""
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(GlmImageAttention())
