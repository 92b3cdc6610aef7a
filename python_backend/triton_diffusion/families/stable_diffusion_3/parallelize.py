"""Stable Diffusion 3 over several ranks: its plans, and attention processors that go through diffusers' dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from triton_diffusion.distributed.sequence import Gather, SequencePlan, Shard
from triton_diffusion.distributed.t5 import t5_tensor_plan
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.families.stable_diffusion_3.family import has_t5
from triton_diffusion.loading.checkpoint import Checkpoint

_IMAGE, _TEXT = "hidden_states", "encoder_hidden_states"


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides."""
    config = checkpoint.config("transformer")
    plan: dict[str, Style] = {"norm_out.linear": "colwise_gather"}
    for index in range(config["num_layers"]):
        plan |= _block_plan(
            f"transformer_blocks.{index}",
            has_second_attention=index in config.get("dual_attention_layers", ()),
            is_last=index == config["num_layers"] - 1,
        )
    plans: dict[str, TensorPlan] = {"transformer": plan}
    if has_t5(checkpoint):
        plans["text_encoder_3"] = t5_tensor_plan(checkpoint.config("text_encoder_3"))
    return plans


def _block_plan(block: str, *, has_second_attention: bool, is_last: bool) -> dict[str, Style]:
    """Heads and feed-forward of both streams are divided; the last block only reads the text."""
    colwise = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
    rowwise = ["attn.to_out.0", "ff.net.2"]
    colwise.append("ff.net.0.proj")
    if has_second_attention:
        colwise += [f"attn2.{name}" for name in ("to_q", "to_k", "to_v")]
        rowwise.append("attn2.to_out.0")
    if not is_last:
        colwise.append("ff_context.net.0.proj")
        rowwise += ["attn.to_add_out", "ff_context.net.2"]
    plan: dict[str, Style] = dict.fromkeys((f"{block}.{name}" for name in colwise), "colwise")
    plan |= dict.fromkeys((f"{block}.{name}" for name in rowwise), "rowwise")
    # The modulation of the norms has over a quarter of the weights.
    plan |= dict.fromkeys((f"{block}.{name}.linear" for name in ("norm1", "norm1_context")), "colwise_gather")
    return plan


def sequence_plan(transformer: Any) -> SequencePlan:
    """Text and image are cut in front of the first block, and the image is put together behind the last layer."""
    return SequencePlan(
        inputs={"transformer_blocks.0": {_IMAGE: Shard(1, (_IMAGE,)), _TEXT: Shard(1, (_TEXT,))}},
        outputs={"proj_out": [Gather(1, _IMAGE)]},
    )


def set_attention_processors(transformer: Any) -> None:
    """Give every attention a JointProcessor of its own; diffusers' ask torch for attention, past the dispatcher."""
    transformer.set_attn_processor({name: JointProcessor() for name in transformer.attn_processors})


class JointProcessor:
    """Attention over image and text, or over the image alone, as diffusers' JointAttnProcessor2_0."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Image (B, S, W) and text (B, L, W) after attention; the image alone where no text is given. No mask is."""

        def project(states: torch.Tensor, *layers: Any) -> list[torch.Tensor]:
            return [layer(states).unflatten(-1, (attn.heads, -1)) for layer in layers]

        query, key, value = project(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        if encoder_hidden_states is not None:
            text = project(encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            query = torch.cat([query, _normed(attn.norm_added_q, text[0])], dim=1)
            key = torch.cat([key, _normed(attn.norm_added_k, text[1])], dim=1)
            value = torch.cat([value, text[2]], dim=1)
        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        attended = attended.flatten(2, 3).to(query.dtype)
        # Behind to_out[0] there is only a dropout, which does nothing here.
        length = hidden_states.shape[1]
        image: torch.Tensor = attn.to_out[0](attended[:, :length])
        if encoder_hidden_states is None:
            return image
        text_out = attended[:, length:]
        return image, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _normed(norm: Any, states: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = states if norm is None else norm(states)
    return normed
