"""Prompts and pictures to FLUX conditioning, as diffusers' pipelines make it.

Of a prompt, CLIP's pooled embedding and T5's sequence; of a picture, latents beside those that are drawn (Kontext), or
what these start from (img2img).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.flux.family import is_kontext, pixels_per_token
from triton_diffusion.families.flux.kontext import preferred_size
from triton_diffusion.families.pictures import resized
from triton_diffusion.families.prompts import (
    all_tokens,
    clip_cut_warning,
    join_warnings,
    sequence_cut_warning,
    token_ids,
)
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass of each encoder.

    Returns for each prompt prompt_embeds (1, max_sequence_length, D) and pooled_prompt_embeds (1, P).
    """
    clip, t5 = components["text_encoder"], components["text_encoder_2"]
    clip_tokenizer, t5_tokenizer = components["tokenizer"], components["tokenizer_2"]
    texts = [prompt.text for prompt in prompts]
    clip_ids = token_ids(clip_tokenizer, texts, clip_tokenizer.model_max_length)
    t5_ids = token_ids(t5_tokenizer, texts, max_sequence_length)
    pooled = clip(clip_ids.to(clip.device)).pooler_output.to(clip.dtype)
    embeds = t5(t5_ids.to(t5.device))[0].to(t5.dtype)
    return [
        EncodedPrompt(
            conditioning={
                "prompt_embeds": embeds[index : index + 1],
                "pooled_prompt_embeds": pooled[index : index + 1],
            },
            warning=join_warnings(
                sequence_cut_warning(t5_tokenizer, text, max_sequence_length), clip_cut_warning(clip_tokenizer, text)
            ),
        )
        for index, text in enumerate(texts)
    ]


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens of both encoders, uncut: what is cut off counts for the warning."""
    tokens = (all_tokens(components[name], prompt.text) for name in ("tokenizer", "tokenizer_2"))
    return (max_sequence_length, *tokens)


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """Of the picture, image_latents (1, C, h, w) for Kontext, in the size that it prefers, whatever is drawn.

    Otherwise initial_moments (1, 2C, H/8, W/8), in the size that is drawn; each row samples its own latents of it.
    """
    vae, image = components["vae"], images[0]
    kontext = is_kontext(components.checkpoint)
    height, width = request.height, request.width
    if kontext:
        height, width = preferred_size(image.shape[0], image.shape[1], pixels_per_token(components.checkpoint))
    posterior = vae.encode(resized(image, height, width).to(vae.device, vae.dtype)).latent_dist
    if not kontext:
        return {"initial_moments": posterior.parameters}
    return {"image_latents": (posterior.mode() - vae.config.shift_factor) * vae.config.scaling_factor}
