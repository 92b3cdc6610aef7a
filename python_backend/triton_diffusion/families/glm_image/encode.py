"""Prompts to GLM-Image conditioning, the words to be written in the picture, and pictures to latents."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.glm_image.family import PIXELS_PER_PRIOR_TOKEN, UPSAMPLING, glyph_texts
from triton_diffusion.families.pictures import resized
from triton_diffusion.families.prompts import cut_warning
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode the quoted words of B prompts in one pass of ByT5.

    Returns for each prompt prompt_embeds (1, L, D), the words one behind the other, and prior_token_drop (1, 1), bool:
    whether the prediction is one without the prior.
    """
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    ids = [_token_ids(components, prompt, max_sequence_length) for prompt in prompts]
    texts = [torch.tensor(text) for prompt in ids for text in prompt]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=tokenizer.pad_token_id)
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(padded.shape[1])[None] < lengths[:, None]).to(encoder.device)
    states = encoder(padded.to(encoder.device), attention_mask=mask.long()).last_hidden_state
    parts = iter(zip(states, mask, strict=True))
    encoded = []
    for prompt, texts_of_prompt in zip(prompts, ids, strict=True):
        embeds = torch.cat([row[kept] for _ in texts_of_prompt for row, kept in [next(parts)]])
        drop = torch.full((1, 1), prompt.is_negative, device=embeds.device)
        conditioning = {"prompt_embeds": embeds[None].to(encoder.dtype), "prior_token_drop": drop}
        encoded.append(EncodedPrompt(conditioning, _warning(components, prompt, max_sequence_length)))
    return encoded


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The quoted words, uncut; a negative prompt without any is one that its caller is told about."""
    return max_sequence_length, prompt.is_negative, tuple(glyph_texts(prompt.text)), bool(prompt.text.strip())


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """Latents condition_latents_N (1, C, h, w) of each picture, of the size it has, in whole tokens."""
    vae = components["vae"]
    pixels = PIXELS_PER_PRIOR_TOKEN // UPSAMPLING
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = {}
    for index, image in enumerate(images):
        height, width = (side // pixels * pixels for side in image.shape[:2])
        picture = resized(image, height, width).to(vae.device, vae.dtype)
        latents[f"condition_latents_{index}"] = (vae.encode(picture).latent_dist.mode() - mean) / std
    return latents


def _token_ids(components: Components, prompt: Prompt, max_sequence_length: int) -> list[list[int]]:
    """Of each quoted text, or of an empty one. As the pipeline does it, an even number of texts is padded in front."""
    tokenizer = components["tokenizer"]
    texts = glyph_texts(prompt.text) or [""]
    ids: list[list[int]] = tokenizer(texts, max_length=max_sequence_length, truncation=True).input_ids
    padding = [tokenizer.pad_token_id] * ((len(texts) + 1) % 2)
    return [padding + text for text in ids]


def _warning(components: Components, prompt: Prompt, max_sequence_length: int) -> str | None:
    texts = glyph_texts(prompt.text)
    if prompt.is_negative and prompt.text.strip() and not texts:
        return "has no effect: of a negative prompt only words in quotation marks count"
    longest = max(len(ids) for ids in components["tokenizer"](texts or [""], verbose=False).input_ids)
    return cut_warning(longest, max_sequence_length)
