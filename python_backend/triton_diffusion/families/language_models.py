"""What the configurations of language models that encode prompts say, without torch."""

from __future__ import annotations

from collections.abc import Mapping

from triton_diffusion.loading.checkpoint import Checkpoint

_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size")


def language_model_counts(
    checkpoint: Checkpoint, name: str, defaults: Mapping[str, int] | None = None
) -> dict[str, int]:
    """What tp_size must divide of the component `name`, for ModelFamily.head_counts of text_encoding.

    A model that also sees pictures has the numbers of its language model in a part of its configuration. defaults: of
    what may be missing there.
    """
    text_config = checkpoint.config(name).get("text_config")
    if isinstance(text_config, Mapping):
        known = {**(defaults or {}), **text_config}
        return {number: int(known[number]) for number in _DIVIDED}
    return {number: int(checkpoint.setting(name, number)) for number in _DIVIDED}
