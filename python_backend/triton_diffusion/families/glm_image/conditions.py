"""What GLM-Image's transformer remembers of condition pictures: their keys and values in every layer.

A picture is seen once, at timestep 0 and by itself; the steps of the denoising attend to what it left. The transformer
belongs to the denoising, so this is made there, for all rows of a batch at once, and kept as long as the batch stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        return None
    drop = conditioning["prior_token_drop"]
    if drop not in _KNOWN:
        rows = list(range(len(drop)))
        dropped = drop[:, 0].tolist()
        conditional = [row for row in rows if not dropped[row]]
        unconditional = [row for row in rows if dropped[row]]
        cache = GlmImageKVCache(transformer.config.num_layers)
        lengths = []
        for index in range(num_pictures):
            latents, tokens = (conditioning[f"condition_{name}_{index}"] for name in ("latents", "token_ids"))
            lengths.append(tokens.shape[1])
            if conditional:
                _write(transformer, cache, latents[conditional], tokens[conditional], conditioning["prompt_embeds"])
        cache.set_mode("read")
        _KNOWN[drop] = Conditions(conditional, unconditional, cache, lengths)
    conditions: Conditions = _KNOWN[drop]
    return conditions


def picture_lengths(lengths: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Arguments of attention that are as long as the condition pictures: sequence parallelism cuts them alike."""
    padded = [*lengths, *[0] * (MAX_IMAGES - len(lengths))]
    return {f"picture_{index}": torch.empty(1, length, device=device) for index, length in enumerate(padded)}


def _write(
    transformer: Any, cache: GlmImageKVCache, latents: torch.Tensor, tokens: torch.Tensor, embeds: torch.Tensor
) -> None:
    """Show the transformer one picture of each row; latents (B, C, h, w), tokens (B, S)."""
    num_rows = len(latents)
    pixels = PIXELS_PER_PRIOR_TOKEN // UPSAMPLING
    size = [side // transformer.config.patch_size * pixels for side in latents.shape[-2:]]
    sizes = torch.tensor([size], device=latents.device).expand(num_rows, -1)
    cache.set_mode("write")
    transformer(
        hidden_states=latents.to(embeds.dtype),
        encoder_hidden_states=embeds.new_zeros(num_rows, 0, embeds.shape[2]),
        prior_token_id=tokens,
        prior_token_drop=torch.zeros_like(tokens, dtype=torch.bool),
        timestep=torch.zeros(num_rows, device=latents.device),
        target_size=sizes,
        crop_coords=torch.zeros_like(sizes),
        attention_kwargs=picture_lengths([], latents.device),
        kv_caches=cache,
    )
