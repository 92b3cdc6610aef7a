"""What families share about prompts: their tokens, and what to say of those that are cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
    """Tokens (B, length), padded or cut."""
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: torch.Tensor = encoded.input_ids
    return ids


def all_tokens(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """The tokens of a prompt, neither padded nor cut."""
    return tuple(tokenizer(prompt, verbose=False).input_ids)


def sequence_cut_warning(tokenizer: Any, prompt: str, max_sequence_length: int) -> str | None:
    """What to tell the caller of a prompt that is longer than what the encoder is given."""
    return cut_warning(len(all_tokens(tokenizer, prompt)), max_sequence_length)


def cut_warning(num_tokens: int, max_sequence_length: int) -> str | None:
    """The same for a prompt whose tokens are counted by the family, such as one inside a template."""
    if num_tokens <= max_sequence_length:
        return None
    return (
        f"the prompt has {num_tokens} tokens and was cut to max_sequence_length={max_sequence_length}; "
        "what stands behind is not drawn"
    )


def clip_cut_warning(tokenizer: Any, prompt: str) -> str | None:
    """The same for a CLIP that stands beside an encoder of longer prompts."""
    num_tokens, length = len(all_tokens(tokenizer, prompt)), tokenizer.model_max_length
    if num_tokens <= length:
        return None
    return f"CLIP, which sets the general direction, reads {length} of its {num_tokens} tokens"


def join_warnings(*warnings: str | None) -> str | None:
    """All of them in one, None if there is none."""
    return "; ".join(filter(None, warnings)) or None
