"""Prompts and pictures to Stable Diffusion 3's conditioning, as diffusers' StableDiffusion3Pipeline makes it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F

from triton_diffusion.families.base import EncodedPrompt, Prompt
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

_CLIPS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass of each encoder.

    Returns for each prompt prompt_embeds (1, C + max_sequence_length, D), CLIP's C tokens and behind them T5's, and
    pooled_prompt_embeds (1, P). The two CLIPs stand side by side, filled up to D with zeros.
    """
    texts = [prompt.text for prompt in prompts]
    clips = [_encode_with_clip(components, tokenizer, encoder, texts) for tokenizer, encoder in _CLIPS]
    clip_embeds, pooled = (torch.cat(parts, dim=-1) for parts in zip(*clips, strict=True))
    t5_embeds = _encode_with_t5(components, texts, max_sequence_length).to(clip_embeds.device)
    clip_embeds = F.pad(clip_embeds, (0, t5_embeds.shape[-1] - clip_embeds.shape[-1]))
    embeds = torch.cat([clip_embeds, t5_embeds], dim=1)
    return [
        EncodedPrompt(
            conditioning={
                "prompt_embeds": embeds[index : index + 1],
                "pooled_prompt_embeds": pooled[index : index + 1],
            },
            warning=_warning(components, text, max_sequence_length),
        )
        for index, text in enumerate(texts)
    ]


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens of all encoders, uncut: what is cut off counts for the warning."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    tokens = (all_tokens(components[name], prompt.text) for name in names if name in components.loaded)
    return (max_sequence_length, *tokens)


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """initial_moments (1, 2C, H/8, W/8) of the picture that is changed; each row samples its own latents of it."""
    vae = components["vae"]
    pixels = resized(images[0], request.height, request.width).to(vae.device, vae.dtype)
    return {"initial_moments": vae.encode(pixels).latent_dist.parameters}


def _encode_with_clip(
    components: Components, tokenizer_name: str, encoder_name: str, texts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """States in front of the last layer (B, C, W), and the projected pooled embedding (B, P)."""
    encoder, first_tokenizer = components[encoder_name], components["tokenizer"]
    ids = token_ids(components[tokenizer_name], texts, first_tokenizer.model_max_length)
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-2].to(encoder.dtype), output.text_embeds


def _encode_with_t5(components: Components, texts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
    """(B, max_sequence_length, D); without T5, zeros."""
    if "text_encoder_3" not in components.loaded:
        width = components.checkpoint.setting("transformer", "joint_attention_dim")
        dtype = components["text_encoder"].dtype
        return torch.zeros(len(texts), max_sequence_length, width, device=components.device, dtype=dtype)
    t5 = components["text_encoder_3"]
    ids = token_ids(components["tokenizer_3"], texts, max_sequence_length)
    embeds: torch.Tensor = t5(ids.to(t5.device))[0].to(t5.dtype)
    return embeds


def _warning(components: Components, text: str, max_sequence_length: int) -> str | None:
    clip_tokenizer = components["tokenizer"]
    if "tokenizer_3" in components.loaded:
        return join_warnings(
            sequence_cut_warning(components["tokenizer_3"], text, max_sequence_length),
            clip_cut_warning(clip_tokenizer, text),
        )
    num_tokens, length = len(all_tokens(clip_tokenizer, text)), clip_tokenizer.model_max_length
    if num_tokens <= length:
        return None
    return (
        f"the prompt has {num_tokens} tokens and was cut to the {length} that CLIP reads; what stands behind is not "
        "drawn, since this checkpoint has no T5"
    )
