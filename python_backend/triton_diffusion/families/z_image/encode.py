"""Prompts to Z-Image conditioning: the last hidden states but one of Qwen3, as diffusers' ZImagePipeline takes them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.pictures import resized
from triton_diffusion.families.prompts import all_tokens, sequence_cut_warning
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass.

    Returns for each prompt prompt_embeds (1, L, D), L being the tokens that the prompt has in its chat template.
    """
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    texts = [_in_template(components, prompt) for prompt in prompts]
    # Not to the full length, as the pipeline does it: no token sees those behind it.
    tokens = tokenizer(
        texts, padding="longest", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    ).to(encoder.device)
    mask = tokens.attention_mask.bool()
    states = encoder(input_ids=tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    return [
        EncodedPrompt({"prompt_embeds": row[kept][None]}, sequence_cut_warning(tokenizer, text, max_sequence_length))
        for row, kept, text in zip(states, mask, texts, strict=True)
    ]


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens, uncut: what is cut off counts for the warning."""
    return max_sequence_length, all_tokens(components["tokenizer"], _in_template(components, prompt))


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """initial_moments (1, 2C, h, w) of the picture that is changed; each row samples its own latents of it."""
    vae = components["vae"]
    pixels = resized(images[0], request.height, request.width).to(vae.device, vae.dtype)
    return {"initial_moments": vae.encode(pixels).latent_dist.parameters}


def _in_template(components: Components, prompt: Prompt) -> str:
    messages = [{"role": "user", "content": prompt.text}]
    text: str = components["tokenizer"].apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return text
