"""Prompts and pictures to HunyuanVideo conditioning, as diffusers' HunyuanVideo pipelines make it.

LLaMA reads the prompt inside a template that asks for a description of a video, LLaVA the picture as well; what belongs
to the template is cut off their hidden states. CLIP reads the bare prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.hunyuan_video.family import (
    FRAMES_LEFT_OUT,
    PICTURE_TEMPLATE_TOKENS,
    TEMPLATE_TOKENS,
    image_condition,
)
from triton_diffusion.families.hunyuan_video.picture_prompts import in_picture_template, read_picture_prompts
from triton_diffusion.families.pictures import resized
from triton_diffusion.families.prompts import all_tokens, clip_cut_warning, cut_warning, join_warnings, token_ids
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# HunyuanVideoPipeline asks for this many, whatever the tokenizer's own limit.
CLIP_TOKENS = 77
# The last hidden states of a language model are about the next token; those of this many layers before are taken.
SKIPPED_LAYERS = 2


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts, with the picture in front of them, in one pass of each encoder.

    Returns for each prompt prompt_embeds (1, L, D), pooled_prompt_embeds (1, P) and prompt_attention_mask (1, L), bool:
    which of the embeddings are no padding. L is max_sequence_length, and PICTURE_TOKENS_KEPT more with pictures.

    Raises:
        InvalidRequestError: the words of a prompt name a picture.
    """
    clip, clip_tokenizer = components["text_encoder_2"], components["tokenizer_2"]
    if image_condition(components.checkpoint):
        embeds, mask = read_picture_prompts(components, prompts, max_sequence_length, SKIPPED_LAYERS)
    else:
        embeds, mask = _read_prompts(components, prompts, max_sequence_length)
    texts = [prompt.text for prompt in prompts]
    pooled = clip(token_ids(clip_tokenizer, texts, CLIP_TOKENS).to(clip.device)).pooler_output
    return [
        EncodedPrompt(
            conditioning={
                "prompt_embeds": embeds[index : index + 1],
                "pooled_prompt_embeds": pooled[index : index + 1],
                "prompt_attention_mask": mask[index : index + 1],
            },
            warning=join_warnings(
                cut_warning(_num_tokens(components, text), max_sequence_length), clip_cut_warning(clip_tokenizer, text)
            ),
        )
        for index, text in enumerate(texts)
    ]


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens of both encoders, uncut: what is cut off counts for the warning. A negative prompt has another picture
    than was given.
    """
    is_negative = prompt.is_negative and bool(prompt.images)
    clip_tokens = all_tokens(components["tokenizer_2"], prompt.text)
    return (max_sequence_length, is_negative, _template_tokens(components, prompt.text), clip_tokens)


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """image_latents (1, C, 1, h, w), float32: the most likely ones of the picture as a video of one frame.

    Raises:
        InvalidRequestError: all frames but one, or all, are of those that are left out.
    """
    if image_condition(components.checkpoint) == "latent_concat" and request.num_frames <= FRAMES_LEFT_OUT + 1:
        raise InvalidRequestError(
            f"num_frames={request.num_frames} must be at least {2 * FRAMES_LEFT_OUT + 1} for this model, of whose "
            f"videos the first {FRAMES_LEFT_OUT} frames are left out; ask for more frames"
        )
    vae = components["vae"]
    pixels = resized(images[0], request.height, request.width).to(vae.device, vae.dtype)
    latents: torch.Tensor = vae.encode(pixels[:, :, None]).latent_dist.mode().float()
    return {"image_latents": latents * vae.config.scaling_factor}


def _read_prompts(
    components: Components, prompts: Sequence[Prompt], max_sequence_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """LLaMA's states (B, max_sequence_length, D) of prompts, and a mask (B, max_sequence_length), bool."""
    llama, tokenizer = components["text_encoder"], components["tokenizer"]
    tokens = tokenizer(
        [_in_template(prompt.text) for prompt in prompts],
        padding="max_length",
        max_length=TEMPLATE_TOKENS + max_sequence_length,
        truncation=True,
        return_tensors="pt",
    ).to(llama.device)
    states = llama(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True).hidden_states
    embeds = states[-(SKIPPED_LAYERS + 1)][:, TEMPLATE_TOKENS:].to(llama.dtype)
    return embeds, tokens.attention_mask[:, TEMPLATE_TOKENS:].bool()


def _in_template(text: str) -> str:
    return str(DEFAULT_PROMPT_TEMPLATE["template"]).format(text)


def _template_tokens(components: Components, text: str) -> tuple[int, ...]:
    """Neither padded nor cut."""
    fill = in_picture_template if image_condition(components.checkpoint) else _in_template
    return all_tokens(components["tokenizer"], fill(text))


def _num_tokens(components: Components, text: str) -> int:
    """Of the prompt and the end of the template."""
    before = PICTURE_TEMPLATE_TOKENS if image_condition(components.checkpoint) else TEMPLATE_TOKENS
    return len(_template_tokens(components, text)) - before
