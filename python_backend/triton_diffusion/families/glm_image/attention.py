"""Attention of GLM-Image's transformer, in the form that batches of several prompts and several ranks need.

diffusers' own GlmImageAttnProcessor makes of the text's mask one over pairs of queries and keys, which cannot be cut
with the sequence, and which does not count the keys of condition pictures; its arithmetic is otherwise this.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_glm_image import GlmImageLayerKVCache


class GlmImageAttention:
    """Attention over condition pictures, text and image, for one attention module."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        kv_cache: GlmImageLayerKVCache | None = None,
        picture_0: torch.Tensor | None = None,
        picture_1: torch.Tensor | None = None,
        picture_2: torch.Tensor | None = None,
        picture_3: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (B, S, D) and text (B, L, D) to the same shapes.

        attention_mask: (B, L), bool, which text is no padding. kv_cache: of condition pictures; in mode "write" it
        takes the keys and values, in mode "read" it gives what it has. picture_N: (1, S_N), as long as this rank's part
        of condition picture N; for the hooks that cut sequences alone, which must know how long all parts are.
        """
        num_text_tokens = encoder_hidden_states.shape[1]
        states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            projection(states).unflatten(2, (attn.heads, -1)) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query).to(states.dtype), attn.norm_k(key).to(states.dtype)
        query, key = (_rotate(tensor, num_text_tokens, image_rotary_emb) for tensor in (query, key))
        num_keys = key.shape[1]
        if kv_cache is not None and kv_cache.mode == "write":
            kv_cache.store(key, value)
        elif kv_cache is not None and kv_cache.mode == "read":
            key, value = kv_cache.get(key, value)
        mask = attention_mask
        if mask is not None:
            pictures = mask.new_ones(len(mask), key.shape[1] - num_keys)
            mask = torch.cat([pictures, mask, mask.new_ones(len(mask), hidden_states.shape[1])], dim=1)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        outputs = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).to(states.dtype)))
        return outputs[:, num_text_tokens:], outputs[:, :num_text_tokens]


def _rotate(
    tensor: torch.Tensor, num_text_tokens: int, positions: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """Rotary embedding of the image tokens; text has no positions."""
    if positions is None:
        return tensor
    text, image = tensor[:, :num_text_tokens], tensor[:, num_text_tokens:]
    # Its annotations leave out the pair of cosines and sines that it takes here.
    rotate: Any = apply_rotary_emb
    rotated = rotate(image, positions, sequence_dim=1, use_real_unbind_dim=-2)
    return torch.cat([text, rotated], dim=1)
