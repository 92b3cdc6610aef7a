"""PromptCache: embeddings of prompts that came before."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable

from triton_diffusion.families.base import EncodedPrompt


class PromptCache:
    """The prompts that were asked for last (LRU), bounded in bytes, in main memory.

    It belongs to one rank; ranks of a group are asked the same in the same order, and so hold the same.
    """

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of all embeddings together; 0 keeps none."""
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, EncodedPrompt] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: Hashable) -> EncodedPrompt | None:
        """The prompt under `key`, which counts as used now."""
        encoded = self._entries.get(key)
        if encoded is not None:
            self._entries.move_to_end(key)
        return encoded

    def put(self, key: Hashable, encoded: EncodedPrompt) -> None:
        """Keep a copy, at the cost of those that were not used for longest; one that is too large is not kept."""
        size = _size_bytes(encoded)
        if size > self._max_bytes or key in self._entries:
            return
        # Copies: a slice would keep the whole batch that it is a part of.
        copies = {name: tensor.cpu().clone() for name, tensor in encoded.conditioning.items()}
        self._entries[key] = dataclasses.replace(encoded, conditioning=copies)
        self.size_bytes += size
        while self.size_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.size_bytes -= _size_bytes(oldest)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self.size_bytes = 0


def _size_bytes(encoded: EncodedPrompt) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in encoded.conditioning.values())
