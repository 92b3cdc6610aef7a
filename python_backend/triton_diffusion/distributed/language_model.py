"""Tensor parallelism of the language models that encode prompts: LLaMA, Mistral, Qwen2.5-VL's text model, Qwen3."""

from __future__ import annotations

from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan

_COLWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_ROWWISE = ("self_attn.o_proj", "mlp.down_proj")


def language_model_plan(model: str = "", *, head: str | None = None) -> TensorPlan:
    """The plan of a transformers decoder.

    model: path of the module that has `layers` and `embed_tokens`; empty: it is the component itself. head: path of the
    layer behind it that tells words. No family calls it, and where its weights are those of the embedding, they must be
    divided alike.
    """
    prefix = f"{model}." if model else ""
    plan: dict[str, Style] = {f"{prefix}embed_tokens": "embedding_gather"}
    plan |= dict.fromkeys((f"{prefix}layers.*.{name}" for name in _COLWISE), "colwise")
    plan |= dict.fromkeys((f"{prefix}layers.*.{name}" for name in _ROWWISE), "rowwise")
    if head is not None:
        plan[head] = "rowwise"
    return plan
