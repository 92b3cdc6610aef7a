"""A picture and the prompt behind it, as LLaVA reads both for HunyuanVideoImageToVideoPipeline.

One token of the template stands for the picture, and LLaVA is given as many in its place as the picture has patches.
The transformer gets some of those, and behind them the prompt without its template.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import Prompt
from triton_diffusion.families.hunyuan_video.family import (
    PICTURE_TEMPLATE_TOKENS,
    PICTURE_TOKENS,
    PICTURE_TOKENS_KEPT,
    image_condition,
)
from triton_diffusion.families.pictures import to_pil
from triton_diffusion.loading.components import Components

IMAGE_TOKEN, _END_OF_ROLE = "<image>", "<|end_header_id|>"
# Where the template has the picture.
_PICTURE_AT = 5
# Of the template behind the prompt, these tokens up to the end of the last role are cut off, and the next is not.
_CUT_BEHIND = 4
# Of the picture's tokens the transformer gets one in so many. The pipeline takes fewer beside a first frame, but not of
# a negative prompt's black picture.
_INTERLEAVE = {"latent_concat": 2, "token_replace": 4}
_NEGATIVE_INTERLEAVE = 2


def in_picture_template(text: str) -> str:
    """What LLaVA is given of a prompt; raises InvalidRequestError where its words name a picture."""
    if IMAGE_TOKEN in text:
        raise InvalidRequestError(f"a prompt has {IMAGE_TOKEN}, which stands for the picture; leave it out")
    return str(DEFAULT_PROMPT_TEMPLATE["template"]).format(text)


def read_picture_prompts(
    components: Components, prompts: Sequence[Prompt], max_sequence_length: int, skipped_layers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (B, PICTURE_TOKENS_KEPT + max_sequence_length, D) of pictures and prompts, and a mask (B, L), bool.

    A negative prompt has a black picture. What is no token, or was cut off, is padding at the end: so all prompts are
    equally long, with more of the picture or less.
    """
    tokenizer = components["tokenizer"]
    tokens = tokenizer(
        [in_picture_template(prompt.text) for prompt in prompts],
        padding="max_length",
        max_length=PICTURE_TEMPLATE_TOKENS + max_sequence_length,
        truncation=True,
        return_tensors="pt",
    )
    states = _read(components, tokens.input_ids, prompts, skipped_layers)
    condition = image_condition(components.checkpoint)
    assert condition is not None
    length = PICTURE_TOKENS_KEPT + max_sequence_length
    embeds = states.new_zeros(len(prompts), length, states.shape[-1])
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for index, prompt in enumerate(prompts):
        step = _NEGATIVE_INTERLEAVE if prompt.is_negative else _INTERLEAVE[condition]
        picture = torch.arange(_PICTURE_AT, _PICTURE_AT + PICTURE_TOKENS, step)
        words = _words(tokens.input_ids[index], tokenizer.convert_tokens_to_ids(_END_OF_ROLE))
        places = torch.cat([picture, words + PICTURE_TOKENS - 1])
        embeds[index, : len(places)] = states[index, places.to(states.device)]
        mask[index, : len(picture)] = True
        mask[index, len(picture) : len(places)] = tokens.attention_mask[index, words].bool()
    return embeds, mask.to(embeds.device)


def _read(components: Components, ids: torch.Tensor, prompts: Sequence[Prompt], skipped_layers: int) -> torch.Tensor:
    """LLaVA's states (B, L + PICTURE_TOKENS - 1, D) of tokens (B, L) and the pictures among them."""
    llava = components["text_encoder"]
    ids = _with_room(ids, llava.config.image_token_index)
    seen = ids != llava.config.pad_token_id
    pictures = [
        torch.zeros_like(image) if prompt.is_negative else image for prompt in prompts for image in prompt.images
    ]
    pixels = components["image_processor"]([to_pil(picture) for picture in pictures], return_tensors="pt").pixel_values
    # The model without its head, which would count the odds of every word behind every token.
    states: torch.Tensor = llava.model(
        input_ids=ids.to(llava.device),
        attention_mask=seen.long().to(llava.device),
        position_ids=(seen.cumsum(-1) - 1).masked_fill(~seen, 1).to(llava.device),
        pixel_values=pixels.to(llava.device),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[-(skipped_layers + 1)]
    return states.to(llava.dtype)


def _with_room(ids: torch.Tensor, image_token: int) -> torch.Tensor:
    """Tokens (B, L) with PICTURE_TOKENS in place of the picture's one."""
    room = ids.new_full((len(ids), PICTURE_TOKENS), image_token)
    return torch.cat([ids[:, :_PICTURE_AT], room, ids[:, _PICTURE_AT + 1 :]], dim=1)


def _words(ids: torch.Tensor, end_of_role: int) -> torch.Tensor:
    """The places in tokens (L,) of the prompt, and of what is behind the template's last role.

    Where that was cut off with the end of a long prompt, the pipeline cuts off as many words of the prompt.
    """
    ends = torch.where(ids == end_of_role)[0].tolist()
    start = ends[-1] + 1 if len(ends) != 2 else len(ids)
    places = torch.arange(PICTURE_TEMPLATE_TOKENS, len(ids))
    return places[(places < start - _CUT_BEHIND) | (places >= start)]
