"""Prompts to HunyuanVideo conditioning, as diffusers' HunyuanVideoPipeline makes it.

LLaMA reads the prompt inside a template that asks for a description of a video; what belongs to the template is cut
off its hidden states. CLIP reads the bare prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.hunyuan_video.family import TEMPLATE_TOKENS
from triton_diffusion.families.prompts import all_tokens, clip_cut_warning, cut_warning, join_warnings, token_ids
from triton_diffusion.loading.components import Components

# HunyuanVideoPipeline asks for this many, whatever the tokenizer's own limit.
CLIP_TOKENS = 77
# The last hidden states of a language model are about the next token; those of this many layers before are taken.
SKIPPED_LAYERS = 2


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass of each encoder.

    Returns for each prompt prompt_embeds (1, max_sequence_length, D), pooled_prompt_embeds (1, P) and
    prompt_attention_mask (1, max_sequence_length), bool: which of the embeddings are no padding.
    """
    llama, clip = components["text_encoder"], components["text_encoder_2"]
    tokenizer, clip_tokenizer = components["tokenizer"], components["tokenizer_2"]
    texts = [prompt.text for prompt in prompts]
    tokens = tokenizer(
        [_in_template(text) for text in texts],
        padding="max_length",
        max_length=TEMPLATE_TOKENS + max_sequence_length,
        truncation=True,
        return_tensors="pt",
    ).to(llama.device)
    states = llama(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True).hidden_states
    embeds = states[-(SKIPPED_LAYERS + 1)][:, TEMPLATE_TOKENS:].to(llama.dtype)
    mask = tokens.attention_mask[:, TEMPLATE_TOKENS:].bool()
    pooled = clip(token_ids(clip_tokenizer, texts, CLIP_TOKENS).to(clip.device)).pooler_output
    return [
        EncodedPrompt(
            conditioning={
                "prompt_embeds": embeds[index : index + 1],
                "pooled_prompt_embeds": pooled[index : index + 1],
                "prompt_attention_mask": mask[index : index + 1],
            },
            warning=join_warnings(
                cut_warning(_num_tokens(tokenizer, text), max_sequence_length), clip_cut_warning(clip_tokenizer, text)
            ),
        )
        for index, text in enumerate(texts)
    ]


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens of both encoders, uncut: what is cut off counts for the warning."""
    llama_tokens = all_tokens(components["tokenizer"], _in_template(prompt.text))
    return (max_sequence_length, llama_tokens, all_tokens(components["tokenizer_2"], prompt.text))


def _in_template(text: str) -> str:
    return str(DEFAULT_PROMPT_TEMPLATE["template"]).format(text)


def _num_tokens(tokenizer: Any, text: str) -> int:
    """Of the prompt and the end of the template."""
    return len(all_tokens(tokenizer, _in_template(text))) - TEMPLATE_TOKENS
