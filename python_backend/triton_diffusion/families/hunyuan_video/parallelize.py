"""HunyuanVideo over several ranks: by plans made here, since diffusers' transformer brings none along."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusers.hooks.tensor_parallel import PackedRowwiseParallel

from triton_diffusion.distributed.language_model import language_model_plan
from triton_diffusion.distributed.sequence import Gather, Leading, SequencePlan, Shard
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.families.hunyuan_video.family import image_condition
from triton_diffusion.loading.checkpoint import Checkpoint

_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"

_COLWISE = (
    *(f"{_DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
    *(f"{_DOUBLE}.{name}.net.0.proj" for name in ("ff", "ff_context")),
    *(f"{_SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
    f"{_SINGLE}.proj_mlp",
)
_ROWWISE = (
    *(f"{_DOUBLE}.attn.{name}" for name in ("to_out.0", "to_add_out")),
    *(f"{_DOUBLE}.{name}.net.2" for name in ("ff", "ff_context")),
)
# Modulation: large weights and, with one vector a row, small outputs.
_GATHERED = (f"{_DOUBLE}.norm1.linear", f"{_DOUBLE}.norm1_context.linear", f"{_SINGLE}.norm.linear", "norm_out.linear")

_IMAGE, _TEXT = ("hidden_states",), ("encoder_hidden_states",)
_MASK = {"attention_mask": Shard(-1, (*_IMAGE, *_TEXT))}
SEQUENCE_PLAN = SequencePlan(
    inputs={
        "transformer_blocks.0": {"hidden_states": Shard(1, _IMAGE), "encoder_hidden_states": Shard(1, _TEXT)},
        _DOUBLE: _MASK,
        _SINGLE: _MASK,
    },
    outputs={"rope": [Shard(0, _IMAGE), Shard(0, _IMAGE)], "proj_out": [Gather(1, "hidden_states")]},
    whole=["context_embedder"],
)
"""The text is refined whole, then both streams are cut at the first block.

Prompts are mostly padding, which attention must not see. The mask for that is made in front of the blocks, for all
tokens in their whole order, image before text, and handed to every block. A rank holds its part of the image and then
its part of the text, so the mask has to be cut stream by stream. Cut in one piece, as if it were one stream, it has the
right length on every rank and belongs to other tokens: the video is wrong, and nothing says so.
"""

_VISION_LAYER, _PROJECTOR = "model.vision_tower.encoder.layers.*", "model.multi_modal_projector"
_LLAVA: TensorPlan = {
    **language_model_plan("model.language_model", head="lm_head"),
    **dict.fromkeys((f"{_VISION_LAYER}.self_attn.{name}_proj" for name in ("q", "k", "v")), "colwise"),
    **dict.fromkeys((f"{_VISION_LAYER}.mlp.fc1", f"{_PROJECTOR}.linear_1"), "colwise"),
    **dict.fromkeys(
        (f"{_VISION_LAYER}.self_attn.out_proj", f"{_VISION_LAYER}.mlp.fc2", f"{_PROJECTOR}.linear_2"), "rowwise"
    ),
}


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides."""
    transformer: dict[str, Style] = dict.fromkeys(_COLWISE, "colwise")
    transformer |= dict.fromkeys(_ROWWISE, "rowwise")
    transformer |= dict.fromkeys(_GATHERED, "colwise_gather")
    # Its input is the output of attention and, behind it, the hidden layer of the feed-forward.
    transformer[f"{_SINGLE}.proj_out"] = PackedRowwiseParallel(_single_block_widths(checkpoint))
    text_encoder = _LLAVA if image_condition(checkpoint) else language_model_plan()
    return {"transformer": transformer, "text_encoder": text_encoder}


def sequence_plan(transformer: Any) -> SequencePlan:
    """Image and text tokens are cut at the first block, and the image is put together behind the last layer.

    A first frame that is given is modulated in another way: of its tokens each rank must know how many it has.
    """
    if transformer.config.image_condition_type != "token_replace":
        return SEQUENCE_PLAN
    first_frame = {"num_tokens": Leading(*_IMAGE)}
    inputs = {
        path: {**arguments, **first_frame} if path in (_DOUBLE, _SINGLE) else arguments
        for path, arguments in SEQUENCE_PLAN.inputs.items()
    }
    return dataclasses.replace(SEQUENCE_PLAN, inputs=inputs)


def _single_block_widths(checkpoint: Checkpoint) -> list[int]:
    config = checkpoint.config("transformer")
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return [width, int(width * float(config.get("mlp_ratio", 4.0)))]
