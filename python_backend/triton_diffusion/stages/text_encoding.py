"""TextEncodingStage: prompts to the tensors that steer the transformer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from hashlib import sha256

from triton_diffusion.families.base import EncodedPrompt, ModelFamily, Prompt
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest
from triton_diffusion.stages.base import StageRequest, TickStage
from triton_diffusion.stages.prompt_cache import PromptCache

NEGATIVE = "negative."
"""Prefix of the negative prompt's tensors."""


class TextEncodingStage(TickStage[StageRequest]):
    """Encodes prompt and, where guidance needs it, negative prompt; all prompts of a batch in one pass."""

    name = "text_encoding"

    def __init__(self, family: ModelFamily, components: Components, cache: PromptCache) -> None:
        self._family = family
        self._components = components
        self._cache = cache
        self._counts: Counter[str] = Counter()

    def items(self, request: StageRequest, row: int) -> StageRequest:
        """A request is one row here."""
        return request

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Leave the conditioning of every request in its outputs."""
        jobs = [(item, self._prompt(item, is_negative=False)) for item in batch]
        checkpoint = self._components.checkpoint
        guided = [item for item in batch if self._family.uses_guidance(item.request, checkpoint)]
        jobs += [(item, self._prompt(item, is_negative=True)) for item in guided]
        keys = [self._key(prompt, item.request) for item, prompt in jobs]
        prompts = {key: prompt for key, (_, prompt) in zip(keys, jobs, strict=True)}
        by_key = self._encode_new(prompts, batch[0].request.max_sequence_length)
        for item in batch:
            item.warnings.clear()
        for (item, prompt), key in zip(jobs, keys, strict=True):
            encoded = by_key[key]
            prefix = NEGATIVE if prompt.is_negative else ""
            item.outputs.update({prefix + name: tensor for name, tensor in encoded.conditioning.items()})
            if encoded.warning:
                item.warnings.append(f"negative prompt: {encoded.warning}" if prefix else encoded.warning)

    def take_counts(self) -> dict[str, int]:
        """Prompts looked up in the cache, and found there."""
        counts, self._counts = self._counts, Counter()
        return dict(counts)

    def forget(self) -> None:
        """Empty the cache."""
        self._cache.clear()
        self._counts.clear()

    def _prompt(self, item: StageRequest, *, is_negative: bool) -> Prompt:
        text = item.request.negative_prompt if is_negative else item.request.prompt
        return Prompt(text, is_negative, item.images if self._family.text_encoder_sees_images else ())

    def _key(self, prompt: Prompt, request: GenerationRequest) -> Hashable:
        key = self._family.encode.cache_key(self._components, prompt, request.max_sequence_length)
        return key, tuple((image.shape, sha256(image.numpy().tobytes()).digest()) for image in prompt.images)

    def _encode_new(self, prompts: dict[Hashable, Prompt], max_sequence_length: int) -> dict[Hashable, EncodedPrompt]:
        """Every prompt's encoding, from the cache or from one pass for all the others."""
        by_key = {key: found for key in prompts if (found := self._cache.get(key)) is not None}
        new = [key for key in prompts if key not in by_key]
        if new:
            encoded = self._family.encode.encode_prompts(
                self._components, [prompts[key] for key in new], max_sequence_length
            )
            by_key.update(zip(new, encoded, strict=True))
        for key in new:
            self._cache.put(key, by_key[key])
        self._counts.update(prompt_cache_lookups_total=len(prompts), prompt_cache_hits_total=len(prompts) - len(new))
        return by_key

    def verify_output(self, item: StageRequest) -> None:
        """Every embedding is finite."""
        item.require_outputs(*item.outputs)
