"""Prompts and pictures to Qwen-Image conditioning, as diffusers' QwenImage pipelines make it."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor

from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.families.base import EncodedPrompt, Prompt
from triton_diffusion.families.pictures import resized, to_pil
from triton_diffusion.families.prompts import all_tokens, sequence_cut_warning
from triton_diffusion.families.qwen_image.family import PICTURE_AREA, PROMPT_PICTURES, fitted_size
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest

IMAGE_TOKEN = "<|image_pad|>"
_PICTURE = "<|vision_start|>{pixels}<|vision_end|>"


@dataclass(frozen=True)
class _Template:
    """The conversation that a prompt is put into; the models were trained with these words.

    instruction: what the system says. num_dropped: tokens up to the prompt, of which the transformer sees nothing.
    picture: what stands in front of the prompt for each picture, counted from 1.
    """

    instruction: str
    num_dropped: int
    picture: str = ""

    def fill(self, text: str, tokens_of_pictures: Sequence[int] = ()) -> str:
        """What the text encoder is given for a prompt and the pictures in front of it."""
        pictures = [
            self.picture.format(number=number, pixels=IMAGE_TOKEN * num_tokens)
            for number, num_tokens in enumerate(tokens_of_pictures, 1)
        ]
        user = f"<|im_start|>user\n{''.join(pictures)}{text}<|im_end|>\n<|im_start|>assistant\n"
        return f"<|im_start|>system\n{self.instruction}<|im_end|>\n{user}"


_EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
_TEMPLATES = {
    "QwenImagePipeline": _Template(
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
        "objects and background:",
        34,
    ),
    "QwenImageEditPipeline": _Template(_EDIT, 64, _PICTURE),
    "QwenImageEditPlusPipeline": _Template(_EDIT, 64, "Picture {number}: " + _PICTURE),
}


def encode_prompts(components: Components, prompts: Sequence[Prompt], max_sequence_length: int) -> list[EncodedPrompt]:
    """Encode B prompts, with the pictures in front of them, in one pass.

    Returns for each prompt prompt_embeds (1, L, D) of its own length L. Without pictures that is at most
    max_sequence_length; the pipelines that edit cut nothing.

    Raises:
        InvalidRequestError: the words of a prompt name a picture that is not there.
    """
    tokenizer, text_encoder = components["tokenizer"], components["text_encoder"]
    template = _TEMPLATES[components.checkpoint.pipeline_class]
    cuts = components.checkpoint.pipeline_class not in PROMPT_PICTURES
    if not cuts and any(IMAGE_TOKEN in prompt.text for prompt in prompts):
        raise InvalidRequestError(f"a prompt has {IMAGE_TOKEN}, which stands for a part of a picture; leave it out")
    pixels, counts = _see(components.checkpoint, [image for prompt in prompts for image in prompt.images])
    numbers = iter(counts)
    texts = [template.fill(prompt.text, [next(numbers) for _ in prompt.images]) for prompt in prompts]
    tokens = tokenizer(
        texts,
        padding=True,
        # Positions count from the left, padding included: a prompt must not move with the others of its batch.
        padding_side="right",
        # No token sees those behind it, so what the transformer does not get need not be encoded.
        max_length=template.num_dropped + max_sequence_length if cuts else None,
        truncation=cuts,
        return_tensors="pt",
    )
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, **pixels}
    # The model below the head, whose logits nobody needs. As in the pipelines, it is not told which tokens are
    # pictures, and so (transformers 5) counts the positions of theirs one by one.
    states = text_encoder.model(
        **{name: tensor.to(text_encoder.device) for name, tensor in inputs.items()}, use_cache=False
    ).last_hidden_state
    lengths = tokens.attention_mask.sum(dim=1).tolist()
    return [
        EncodedPrompt(
            conditioning={"prompt_embeds": states[index : index + 1, template.num_dropped : length]},
            warning=sequence_cut_warning(tokenizer, prompt.text, max_sequence_length) if cuts else None,
        )
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def cache_key(components: Components, prompt: Prompt, max_sequence_length: int) -> Hashable:
    """The tokens of the whole conversation, uncut: what is cut off counts for the warning."""
    template = _TEMPLATES[components.checkpoint.pipeline_class]
    return max_sequence_length, all_tokens(components["tokenizer"], template.fill(prompt.text))


def encode_images(
    components: Components, images: Sequence[torch.Tensor], request: GenerationRequest
) -> dict[str, torch.Tensor]:
    """The latents of each picture: image_latents_0 (1, C, h, w) and so on, of about a million pixels."""
    vae = components["vae"]
    mean, std = (
        torch.tensor(vae.config[name], device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    latents: dict[str, torch.Tensor] = {}
    for index, image in enumerate(images):
        pixels = resized(image, *fitted_size(PICTURE_AREA, *image.shape[:2])).to(vae.device, vae.dtype)
        # A video of one frame.
        mode = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        latents[f"image_latents_{index}"] = (mode - mean) / std
    return latents


def _see(checkpoint: Checkpoint, images: Sequence[torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """What the text encoder is given of pictures uint8 (H, W, 3), and how many tokens each of them is."""
    if not images:
        return {}, []
    area, _ = PROMPT_PICTURES[checkpoint.pipeline_class]
    processor = _image_processor(checkpoint.component_path("processor"))
    sizes = [fitted_size(area, *image.shape[:2]) for image in images]
    seen = processor(
        images=[
            to_pil(image).resize((width, height), Image.Resampling.LANCZOS)
            for image, (height, width) in zip(images, sizes, strict=True)
        ],
        return_tensors="pt",
    )
    grids: torch.Tensor = seen["image_grid_thw"]
    counts: list[int] = (grids.prod(dim=1) // processor.merge_size**2).tolist()
    return {"pixel_values": seen["pixel_values"], "image_grid_thw": grids}, counts


@functools.cache
def _image_processor(path: Path) -> Any:
    """The part of Qwen2VLProcessor that is for pictures; another part, for videos, would need torchvision."""
    return AutoImageProcessor.from_pretrained(path, local_files_only=True)
