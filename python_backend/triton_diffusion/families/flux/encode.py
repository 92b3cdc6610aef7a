"""Prompts to FLUX conditioning: CLIP's pooled embedding and T5's sequence, as diffusers' FluxPipeline makes them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from triton_diffusion.families.base import EncodedPrompt
from triton_diffusion.loading.components import Components


def encode_prompts(components: Components, prompts: Sequence[str], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass of each encoder.

    Returns for each prompt prompt_embeds (1, max_sequence_length, D) and pooled_prompt_embeds (1, P).
    """
    clip, t5 = components["text_encoder"], components["text_encoder_2"]
    clip_ids = _token_ids(components["tokenizer"], prompts, components["tokenizer"].model_max_length)
    t5_ids = _token_ids(components["tokenizer_2"], prompts, max_sequence_length)
    pooled = clip(clip_ids.to(clip.device)).pooler_output.to(clip.dtype)
    embeds = t5(t5_ids.to(t5.device))[0].to(t5.dtype)
    return [
        EncodedPrompt(
            conditioning={
                "prompt_embeds": embeds[index : index + 1],
                "pooled_prompt_embeds": pooled[index : index + 1],
            },
            warning=_cut_warning(components, prompt, max_sequence_length),
        )
        for index, prompt in enumerate(prompts)
    ]


def cache_key(components: Components, prompt: str, max_sequence_length: int) -> Hashable:
    """The tokens of both encoders, uncut: what is cut off counts for the warning."""
    tokens = (tuple(components[name](prompt, verbose=False).input_ids) for name in ("tokenizer", "tokenizer_2"))
    return (max_sequence_length, *tokens)


def _token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: torch.Tensor = encoded.input_ids
    return ids


def _cut_warning(components: Components, prompt: str, max_sequence_length: int) -> str | None:
    warnings = []
    t5_tokens = len(components["tokenizer_2"](prompt, verbose=False).input_ids)
    if t5_tokens > max_sequence_length:
        warnings.append(
            f"the prompt has {t5_tokens} tokens and was cut to max_sequence_length={max_sequence_length}; "
            "what stands behind is not drawn"
        )
    clip_length = components["tokenizer"].model_max_length
    clip_tokens = len(components["tokenizer"](prompt, verbose=False).input_ids)
    if clip_tokens > clip_length:
        warnings.append(f"CLIP, which sets the general direction, reads {clip_length} of its {clip_tokens} tokens")
    return "; ".join(warnings) or None
