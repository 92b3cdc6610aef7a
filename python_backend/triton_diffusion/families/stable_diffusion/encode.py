"""Prompts and pictures to Stable Diffusion's conditioning, as diffusers' StableDiffusionPipeline makes it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.pictures import resized
from triton_diffusion.families.prompts import all_tokens, sequence_cut_warning, token_ids
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

NUM_MARKS = 2


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass. Returns for each prompt prompt_embeds (1, max_sequence_length, D)."""
    tokenizer, clip = components["tokenizer"], components["text_encoder"]
    ids = clip_token_ids(tokenizer, [prompt.text for prompt in prompts], max_sequence_length)
    embeds = clip(ids.to(clip.device))[0].to(clip.dtype)
    return [
        EncodedPrompt(
            conditioning={"prompt_embeds": embeds[index : index + 1]},
            warning=sequence_cut_warning(tokenizer, prompt.text, max_sequence_length),
        )
        for index, prompt in enumerate(prompts)
    ]


def clip_token_ids(tokenizer: Any, texts: Sequence[str], length: int) -> torch.Tensor:
    """Tokens (B, length), the first and the last of a prompt being CLIP's marks for its start and its end.

    Raises:
        InvalidRequestError: there is no room for them.
    """
    if length < NUM_MARKS:
        raise InvalidRequestError(
            f"max_sequence_length={length} must be at least {NUM_MARKS}: CLIP marks start and end of a prompt"
        )
    return token_ids(tokenizer, texts, length)


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """CLIP's tokens, uncut: what is cut off counts for the warning."""
    return max_sequence_length, all_tokens(components["tokenizer"], prompt.text)


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """initial_moments (1, 2C, H/8, W/8) of the picture that is changed; each row samples its own latents of it."""
    vae = components["vae"]
    pixels = resized(images[0], request.height, request.width).to(vae.device, components.dtype)
    return {"initial_moments": vae.encode(pixels.to(vae.dtype)).latent_dist.parameters}
