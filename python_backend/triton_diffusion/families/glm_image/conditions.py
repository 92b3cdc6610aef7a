"""What GLM-Image's transformer remembers of condition pictures: their keys and values in every layer.

A picture is seen once, at timestep 0 and by itself; the steps of the denoising attend to what it left. The transformer
belongs to the denoising, so this is made there, row by row, and kept as long as the row stays in its batches: when
another row comes or goes, only new pictures are shown. Rows with the same pictures share what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch.utils.weak import WeakTensorKeyDictionary

from triton_diffusion.families.glm_image.family import MAX_IMAGES, PIXELS_PER_PRIOR_TOKEN, UPSAMPLING


@dataclass(frozen=True)
class Conditions:
    """The condition pictures of a batch.

    conditional: rows that see them; row i of the cache is that of conditional[i]. unconditional: all others.
    lengths: tokens of each picture.
    """

    conditional: list[int]
    unconditional: list[int]
    cache: GlmImageKVCache
    lengths: list[int]


@dataclass(frozen=True)
class _Seen:
    """The pictures of one row: their latents and tokens, each (1, ...), and the keys and values that they left."""

    pictures: list[tuple[torch.Tensor, torch.Tensor]]
    cache: GlmImageKVCache

    def shows(self, pictures: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Whether these are its pictures."""
        return len(pictures) == len(self.pictures) and all(
            torch.equal(one, other)
            for mine, theirs in zip(self.pictures, pictures, strict=True)
            for one, other in zip(mine, theirs, strict=True)
        )


# By the transformer that has seen them: the rows of its last batch, if that had pictures.
_SEEN: WeakKeyDictionary[Any, list[_Seen]] = WeakKeyDictionary()
# By the stacked `prior_token_drop` of a batch, which says what kind each row is: it is another tensor in every batch,
# and goes with it.
_KNOWN: Any = WeakTensorKeyDictionary()


def conditions_of(transformer: Any, conditioning: Mapping[str, torch.Tensor]) -> Conditions | None:
    """The condition pictures of a batch, None if it has none; all its rows have pictures of the same shapes.

    conditioning: condition_latents_N (B, C, h, w) and condition_token_ids_N (B, S_N) for each picture, and
    prior_token_drop (B, 1).
    """
    num_pictures = sum(name.startswith("condition_latents_") for name in conditioning)
    if not num_pictures:
        _SEEN.pop(transformer, None)
        return None
    drop = conditioning["prior_token_drop"]
    if drop not in _KNOWN:
        rows = list(range(len(drop)))
        dropped = drop[:, 0].tolist()
        conditional = [row for row in rows if not dropped[row]]
        unconditional = [row for row in rows if dropped[row]]
        pictures = [
            (conditioning[f"condition_latents_{index}"], conditioning[f"condition_token_ids_{index}"])
            for index in range(num_pictures)
        ]
        seen = _see(transformer, [[_row(each, row) for each in pictures] for row in conditional], conditioning)
        lengths = [tokens.shape[1] for _, tokens in pictures]
        _KNOWN[drop] = Conditions(conditional, unconditional, _together(transformer, seen), lengths)
    conditions: Conditions = _KNOWN[drop]
    return conditions


def picture_lengths(lengths: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Arguments of attention that are as long as the condition pictures: sequence parallelism cuts them alike."""
    padded = [*lengths, *[0] * (MAX_IMAGES - len(lengths))]
    return {f"picture_{index}": torch.empty(1, length, device=device) for index, length in enumerate(padded)}


def _row(picture: tuple[torch.Tensor, torch.Tensor], row: int) -> tuple[torch.Tensor, torch.Tensor]:
    latents, tokens = picture
    return latents[row : row + 1], tokens[row : row + 1]


def _see(
    transformer: Any,
    pictures_by_row: list[list[tuple[torch.Tensor, torch.Tensor]]],
    conditioning: Mapping[str, torch.Tensor],
) -> list[_Seen]:
    """What is kept of each row's pictures; those that no row of this batch or of the last one had are shown now."""
    last = _SEEN.get(transformer, [])
    seen: list[_Seen] = []
    for pictures in pictures_by_row:
        known = next((row for row in (*seen, *last) if row.shows(pictures)), None)
        if known is None:
            known = _Seen(pictures, GlmImageKVCache(transformer.config.num_layers))
            for latents, tokens in pictures:
                _write(transformer, known.cache, latents, tokens, conditioning["prompt_embeds"])
        seen.append(known)
    _SEEN[transformer] = seen
    return seen


def _together(transformer: Any, seen: list[_Seen]) -> GlmImageKVCache:
    """One cache for all rows, which holds their tensors and no copies."""
    cache = GlmImageKVCache(transformer.config.num_layers)
    for index, layer in enumerate(cache.caches):
        layer.k_caches = [row.cache[index].k_caches[0] for row in seen]
        layer.v_caches = [row.cache[index].v_caches[0] for row in seen]
    cache.set_mode("read")
    return cache


def _write(
    transformer: Any, cache: GlmImageKVCache, latents: torch.Tensor, tokens: torch.Tensor, embeds: torch.Tensor
) -> None:
    """Show the transformer a picture; latents (1, C, h, w), tokens (1, S)."""
    pixels = PIXELS_PER_PRIOR_TOKEN // UPSAMPLING
    size = [side // transformer.config.patch_size * pixels for side in latents.shape[-2:]]
    sizes = torch.tensor([size], device=latents.device)
    cache.set_mode("write")
    transformer(
        hidden_states=latents.to(embeds.dtype),
        encoder_hidden_states=embeds.new_zeros(1, 0, embeds.shape[2]),
        prior_token_id=tokens,
        prior_token_drop=torch.zeros_like(tokens, dtype=torch.bool),
        timestep=torch.zeros(1, device=latents.device),
        target_size=sizes,
        crop_coords=torch.zeros_like(sizes),
        attention_kwargs=picture_lengths([], latents.device),
        kv_caches=cache,
    )
