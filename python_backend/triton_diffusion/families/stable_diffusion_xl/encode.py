"""Prompts and pictures to Stable Diffusion XL's conditioning, as diffusers' StableDiffusionXLPipeline makes it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.prompts import all_tokens, sequence_cut_warning
from triton_diffusion.families.stable_diffusion import encode as stable_diffusion
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

_CLIPS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass of each CLIP.

    Returns for each prompt prompt_embeds (1, max_sequence_length, D), the two CLIPs' states in front of their last
    layer side by side, and pooled_prompt_embeds (1, P) of the second.
    """
    embeds, pooled = _encode(components, [prompt.text for prompt in prompts], max_sequence_length)
    encoded = []
    for index, prompt in enumerate(prompts):
        conditioning = {
            "prompt_embeds": embeds[index : index + 1],
            "pooled_prompt_embeds": pooled[index : index + 1],
        }
        if _is_zeroed(components, prompt):
            conditioning = {name: torch.zeros_like(tensor) for name, tensor in conditioning.items()}
        warning = sequence_cut_warning(components["tokenizer"], prompt.text, max_sequence_length)
        encoded.append(EncodedPrompt(conditioning, warning))
    return encoded


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens of both CLIPs, uncut: what is cut off counts for the warning."""
    tokens = (all_tokens(components[tokenizer], prompt.text) for tokenizer, _ in _CLIPS)
    return (max_sequence_length, _is_zeroed(components, prompt), *tokens)


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """initial_moments (1, 2C, H/8, W/8) of the picture that is changed, float32 if the autoencoder asks for that."""
    vae = components["vae"]
    if vae.config.force_upcast and vae.dtype != torch.float32:
        vae.to(torch.float32)
    return stable_diffusion.encode_images(components, images, request)


def _is_zeroed(components: Components, prompt: Prompt) -> bool:
    """Whether this is a negative prompt that says nothing, of a checkpoint that has learnt zeros for it."""
    forces_zeros = components.checkpoint.index.get("force_zeros_for_empty_prompt", True)
    return bool(forces_zeros) and prompt.is_negative and not prompt.text


def _encode(
    components: Components, texts: Sequence[str], max_sequence_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences (B, max_sequence_length, D) and pooled embeddings (B, P)."""
    outputs = []
    for tokenizer, encoder in _CLIPS:
        ids = stable_diffusion.clip_token_ids(components[tokenizer], texts, max_sequence_length)
        clip = components[encoder]
        outputs.append(clip(ids.to(clip.device), output_hidden_states=True))
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return embeds.to(components.dtype), outputs[-1].text_embeds
