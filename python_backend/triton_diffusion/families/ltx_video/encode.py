"""Prompts and pictures to LTX-Video conditioning, as diffusers' LTX pipelines make it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.ltx_video.family import latent_size, takes_conditions
from triton_diffusion.families.pictures import resized
from triton_diffusion.families.prompts import all_tokens, sequence_cut_warning
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass.

    Returns for each prompt prompt_embeds (1, max_sequence_length, D) and prompt_attention_mask (1,
    max_sequence_length), bool. The transformer does not see the padding; T5 does, but for LTXConditionPipeline.
    """
    t5, tokenizer = components["text_encoder"], components["tokenizer"]
    texts = [prompt.text for prompt in prompts]
    tokens = tokenizer(
        texts, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    )
    seen = tokens.attention_mask.to(t5.device) if takes_conditions(components.checkpoint) else None
    embeds = t5(tokens.input_ids.to(t5.device), attention_mask=seen)[0].to(t5.dtype)
    mask = tokens.attention_mask.bool()
    return [
        EncodedPrompt(
            conditioning={
                "prompt_embeds": embeds[index : index + 1],
                "prompt_attention_mask": mask[index : index + 1],
            },
            warning=sequence_cut_warning(tokenizer, text, max_sequence_length),
        )
        for index, text in enumerate(texts)
    ]


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens, uncut: what is cut off counts for the warning."""
    return (max_sequence_length, all_tokens(components["tokenizer"], prompt.text))


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """The first frame, of which the rows draw samples, and which tokens are its.

    Returns initial_moments (1, 2C, 1, h, w); initial_mean and initial_std (1, C), by which latents are normalised;
    given_tokens (1, S), bool.
    """
    vae = components["vae"]
    frames, height, width = latent_size(components.checkpoint, request)
    picture = resized(images[0], request.height, request.width)[:, :, None]
    given = torch.zeros(1, frames, height * width, dtype=torch.bool)
    given[:, 0] = True
    return {
        "initial_moments": vae.encode(picture.to(vae.device, vae.dtype)).latent_dist.parameters,
        "initial_mean": vae.latents_mean[None],
        "initial_std": vae.latents_std[None],
        "given_tokens": given.flatten(1),
    }
