"""Prompts and pictures to Wan's conditioning, as diffusers' WanPipeline and WanImageToVideoPipeline make it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.video_processor import VideoProcessor

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.pictures import to_pil
from triton_diffusion.families.prompts import all_tokens, sequence_cut_warning
from triton_diffusion.families.wan.family import TEXT_LENGTH, compression, traits
from triton_diffusion.families.wan.normalization import normalize
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts in one pass of UMT5.

    Returns for each prompt encoder_hidden_states (1, max_sequence_length, D), zeros behind its last token. A
    transformer that attends to CLIP's pictures tells them from the text by a fixed length of the text, so for those
    zeros go on up to TEXT_LENGTH.
    """
    tokenizer, encoder = components["tokenizer"], components["text_encoder"]
    texts = [prompt_clean(prompt.text) for prompt in prompts]
    tokens = tokenizer(
        texts, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    ).to(encoder.device)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.to(encoder.dtype)
    states = states.masked_fill(~tokens.attention_mask[..., None].bool(), 0)
    if traits(components.checkpoint).has_clip:
        states = F.pad(states, (0, 0, 0, TEXT_LENGTH - max_sequence_length))
    return [
        EncodedPrompt(
            conditioning={"encoder_hidden_states": states[index : index + 1]},
            warning=sequence_cut_warning(tokenizer, text, max_sequence_length),
        )
        for index, text in enumerate(texts)
    ]


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens, uncut: what is cut off counts for the warning."""
    return max_sequence_length, all_tokens(components["tokenizer"], prompt_clean(prompt.text))


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """The first frame, and perhaps the last one, as the checkpoint wants them.

    Returns one of
        first_frame (1, C, 1, h, w): latents that take the place of the first frame;
        condition (1, T + C, F, h, w): further channels of the latents, of which the first T (frames a latent frame)
            say which frames are given, and the others are the latents of a video that is gray but for those;
    and with CLIP encoder_hidden_states_image (1, pictures * L, D).
    """
    has = traits(components.checkpoint)
    vae = components["vae"]
    processor = VideoProcessor(vae_scale_factor=compression(components.checkpoint)[1])
    pictures = [to_pil(image) for image in images]
    first, *last = (
        processor.preprocess(picture, height=request.height, width=request.width)[:, :, None].to(vae.device)
        for picture in pictures
    )
    if has.keeps_first_frame:
        return {"first_frame": normalize(vae, _encode(vae, first))}
    num_gray = request.num_frames - len(images)
    if num_gray < 0:
        raise InvalidRequestError(
            f"num_frames={request.num_frames} is fewer than the {len(images)} pictures given; ask for more frames"
        )
    video = torch.cat([first, first.new_zeros(*first.shape[:2], num_gray, *first.shape[3:]), *last], dim=2)
    latents = normalize(vae, _encode(vae, video))
    condition = torch.cat([_given_frames(components, request, latents, has_last=bool(last)), latents], dim=1)
    outputs = {"condition": condition.to(components.dtype)}
    if has.has_clip:
        clip = components["image_encoder"]
        pixels = components["image_processor"](images=pictures, return_tensors="pt").pixel_values
        states = clip(pixels.to(clip.device), output_hidden_states=True).hidden_states[-2]
        outputs["encoder_hidden_states_image"] = states.flatten(0, 1)[None]
    return outputs


def _encode(vae: Any, video: torch.Tensor) -> torch.Tensor:
    """The most likely latents (1, C, F, h, w), float32, of a video (1, 3, frames, H, W)."""
    latents: torch.Tensor = vae.encode(video.to(vae.dtype)).latent_dist.mode().float()
    return latents


def _given_frames(
    components: Components, request: GenerationRequest, latents: torch.Tensor, *, has_last: bool
) -> torch.Tensor:
    """1 where a frame is given, else 0: (1, T, F, h, w), T frames of each latent frame.

    The first latent frame is one frame alone, and has its number T times.
    """
    temporal, _ = compression(components.checkpoint)
    given = torch.zeros(temporal - 1 + request.num_frames, device=latents.device)
    given[:temporal] = 1
    given[len(given) - has_last :] = 1
    by_latent_frame = given.view(-1, temporal).T
    return by_latent_frame[None, :, :, None, None].expand(1, -1, -1, *latents.shape[3:])
