"""TextEncodingStage: prompts to the tensors that steer the transformer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from triton_diffusion.families.base import EncodedPrompt, ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import StageRequest, TickStage
from triton_diffusion.stages.prompt_cache import PromptCache

NEGATIVE = "negative."
"""Prefix of the negative prompt's tensors."""


class TextEncodingStage(TickStage[StageRequest]):
    """Encodes prompt and, where guidance needs it, negative prompt; all prompts of a batch in one pass."""

    name = "text_encoding"

    def __init__(self, family: ModelFamily, components: Components, cache: PromptCache) -> None:
        self._encode = family.encode
        self._components = components
        self._cache = cache
        self._counts: Counter[str] = Counter()

    def items(self, request: StageRequest, row: int) -> StageRequest:
        """A request is one row here."""
        return request

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Leave the conditioning of every request in its outputs."""
        jobs = [(item, "", item.request.prompt) for item in batch]
        jobs += [(item, NEGATIVE, item.request.negative_prompt) for item in batch if item.request.uses_guidance]
        prompts = list(dict.fromkeys(prompt for _, _, prompt in jobs))
        by_prompt = self._encode_new(prompts, batch[0].request.max_sequence_length)
        for item in batch:
            item.warnings.clear()
        for item, prefix, prompt in jobs:
            tensors: dict[str, torch.Tensor] = by_prompt[prompt].conditioning
            item.outputs.update({prefix + name: tensor for name, tensor in tensors.items()})
            if warning := by_prompt[prompt].warning:
                item.warnings.append(f"negative prompt: {warning}" if prefix else warning)

    def take_counts(self) -> dict[str, int]:
        """Prompts looked up in the cache, and found there."""
        counts, self._counts = self._counts, Counter()
        return dict(counts)

    def forget(self) -> None:
        """Empty the cache."""
        self._cache.clear()
        self._counts.clear()

    def _encode_new(self, prompts: list[str], max_sequence_length: int) -> dict[str, EncodedPrompt]:
        """Every prompt's encoding, from the cache or from one pass for all the others."""
        keys = {prompt: self._encode.cache_key(self._components, prompt, max_sequence_length) for prompt in prompts}
        by_prompt = {prompt: found for prompt, key in keys.items() if (found := self._cache.get(key)) is not None}
        new = [prompt for prompt in prompts if prompt not in by_prompt]
        if new:
            encoded = self._encode.encode_prompts(self._components, new, max_sequence_length)
            by_prompt.update(zip(new, encoded, strict=True))
        for prompt in new:
            self._cache.put(keys[prompt], by_prompt[prompt])
        self._counts.update(prompt_cache_lookups_total=len(prompts), prompt_cache_hits_total=len(prompts) - len(new))
        return by_prompt

    def verify_output(self, item: StageRequest) -> None:
        """Every embedding is finite."""
        item.require_outputs(*item.outputs)
