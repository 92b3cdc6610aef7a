"""Tensor parallelism of T5 encoders, the text encoders of FLUX, SD3 and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan

_ATTENTION, _FEED_FORWARD = "encoder.block.*.layer.0.SelfAttention", "encoder.block.*.layer.1.DenseReluDense"


def t5_tensor_plan(config: Mapping[str, Any]) -> TensorPlan:
    """The plan of a transformers T5EncoderModel with this config.json.

    The first block has the position bias of all, with a column a head. Embeddings have two names, one in the files and
    one that is called.
    """
    is_gated = str(config.get("feed_forward_proj", "relu")).startswith("gated-")
    styles: dict[str, Style] = dict.fromkeys((f"{_ATTENTION}.{name}" for name in "qkv"), "colwise")
    styles |= dict.fromkeys(
        (f"{_FEED_FORWARD}.{name}" for name in (("wi_0", "wi_1") if is_gated else ("wi",))), "colwise"
    )
    styles |= {f"{_ATTENTION}.o": "rowwise", f"{_FEED_FORWARD}.wo": "rowwise"}
    styles["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"] = "embedding_heads"
    styles |= dict.fromkeys(("shared", "encoder.embed_tokens"), "embedding_gather")
    return styles
