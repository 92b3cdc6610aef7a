"""Prompts and pictures to FLUX.2 conditioning, as diffusers' Flux2Pipeline and Flux2KleinPipeline make it."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from PIL import Image
from transformers import PreTrainedTokenizerFast

from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.flux2.family import PATCH_SIZE, is_klein, pixels_per_token
from triton_diffusion.families.flux2.latents import normalized
from triton_diffusion.families.flux2.references import cropped_size, scaled_size
from triton_diffusion.families.latents import pack_latents
from triton_diffusion.families.pictures import from_pil, to_pil
from triton_diffusion.families.prompts import all_tokens, cut_warning
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

# The states behind these layers stand side by side.
_KLEIN_LAYERS, _MISTRAL_LAYERS = (9, 18, 27), (10, 20, 30)


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass.

    Returns for each prompt prompt_embeds (1, max_sequence_length, 3 * D): the transformer sees padding, too.
    """
    encoder, klein = components["text_encoder"], is_klein(components.checkpoint)
    tokens = (_klein_tokens if klein else _mistral_tokens)(components, prompts, max_sequence_length)
    # The model without its head, which would count the odds of every word behind every token.
    states = encoder.model(
        input_ids=tokens["input_ids"].to(encoder.device),
        attention_mask=tokens["attention_mask"].to(encoder.device),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    embeds = torch.cat([states[layer] for layer in (_KLEIN_LAYERS if klein else _MISTRAL_LAYERS)], dim=-1)
    return [
        EncodedPrompt(
            {"prompt_embeds": embeds[index : index + 1].to(encoder.dtype)},
            cut_warning(len(_all_tokens(components, prompt)), max_sequence_length),
        )
        for index, prompt in enumerate(prompts)
    ]


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens, uncut: what is cut off counts for the warning."""
    return max_sequence_length, _all_tokens(components, prompt)


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """image_latents_N (1, h, w, C * 4) of every picture, as patches: argmax of the posterior, normalized."""
    vae = components["vae"]
    latents: dict[str, torch.Tensor] = {}
    for index, image in enumerate(images):
        pixels = _cropped(image, pixels_per_token(components.checkpoint)).to(vae.device, vae.dtype)
        mode = vae.encode(pixels).latent_dist.mode()
        grid = (mode.shape[2] // PATCH_SIZE, mode.shape[3] // PATCH_SIZE)
        latents[f"image_latents_{index}"] = normalized(vae, pack_latents(mode)).unflatten(1, grid)
    return latents


def _cropped(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """(1, 3, H, W): scaled down where it is too large, and the middle of that."""
    height, width = scaled_size(image.shape[0], image.shape[1])
    picture = to_pil(image)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    kept_height, kept_width = cropped_size(image.shape[0], image.shape[1], multiple)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return from_pil(picture.crop((left, top, left + kept_width, top + kept_height)))


def _klein_tokens(components: Components, prompts: Sequence[Prompt], length: int) -> Any:
    texts = [_in_template(components, prompt) for prompt in prompts]
    return components["tokenizer"](texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def _in_template(components: Components, prompt: Prompt) -> str:
    messages = [{"role": "user", "content": prompt.text}]
    text: str = components["tokenizer"].apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text


def _mistral_tokens(components: Components, prompts: Sequence[Prompt], length: int) -> Any:
    return _mistral_tokenizer(components).apply_chat_template(
        [_messages(prompt) for prompt in prompts],
        add_generation_prompt=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=length,
    )


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    # The processor would look for a picture where a prompt says this.
    texts = {"system": SYSTEM_MESSAGE, "user": prompt.text.replace("[IMG]", "")}
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]


def _all_tokens(components: Components, prompt: Prompt) -> tuple[int, ...]:
    """Neither padded nor cut."""
    if is_klein(components.checkpoint):
        return all_tokens(components["tokenizer"], _in_template(components, prompt))
    tokens = _mistral_tokenizer(components).apply_chat_template([_messages(prompt)], tokenize=True, return_dict=True)
    return tuple(tokens["input_ids"][0])


def _mistral_tokenizer(components: Components) -> Any:
    return _read_tokenizer(components.checkpoint.component_path("tokenizer"))


@functools.cache
def _read_tokenizer(path: Path) -> Any:
    """The part of PixtralProcessor that is for text; the other, for pictures, would need torchvision."""
    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
