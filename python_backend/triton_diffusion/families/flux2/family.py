"""FLUX.2 as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.families.flux2.references import LARGEST_AREA, check_reference, cropped_size
from triton_diffusion.families.language_models import language_model_counts
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

# The transformer takes 2 x 2 latent pixels as one token (latents.PATCH_SIZE, whose module needs torch).
PATCH_SIZE = 2
# That of the pipelines' tokenizers: the transformer has seen no longer ones.
LONGEST_SEQUENCE_LENGTH = 512
MOST_IMAGES = 10


def pixels_per_token(checkpoint: Checkpoint) -> int:
    """Pixels along one side of the square that one token stands for."""
    halvings = len(checkpoint.setting("vae", "block_out_channels")) - 1
    size: int = PATCH_SIZE * 2**halvings
    return size


def is_klein(checkpoint: Checkpoint) -> bool:
    """Whether Qwen3 encodes the prompt and guidance is classifier-free; otherwise Mistral, and it is distilled."""
    return checkpoint.pipeline_class == "Flux2KleinPipeline"


class Flux2Family(ModelFamily):
    """FLUX.2-dev, FLUX.2-klein and checkpoints trained from them."""

    name = "flux2"
    pipeline_classes = ("Flux2Pipeline", "Flux2KleinPipeline")
    tasks = ("text-to-image", "image-to-image")

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """One language model, Mistral's tokenizer being read by encode.py itself; one transformer."""
        tokenizer = ("tokenizer",) if is_klein(checkpoint) else ()
        return {
            "image_encoding": ("vae",),
            "text_encoding": (*tokenizer, "text_encoder"),
            "denoising": ("scheduler", "transformer"),
            "decoding": ("vae",),
        }

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """The pipelines' own defaults; the size is the one that the autoencoder was trained at.

        A checkpoint that says it is distilled draws in 4 steps without guidance (FLUX.2-klein's model card).
        """
        few_steps = bool(checkpoint.index.get("is_distilled"))
        guidance_distilled = bool(checkpoint.config("transformer").get("guidance_embeds", True))
        size = int(checkpoint.setting("vae", "sample_size"))
        return RequestDefaults(
            height=size,
            width=size,
            size_multiple=pixels_per_token(checkpoint),
            num_inference_steps=4 if few_steps else 50,
            guidance_scale=4.0 if is_klein(checkpoint) and not few_steps else 1.0,
            embedded_guidance_scale=4.0 if guidance_distilled else None,
            max_sequence_length=LONGEST_SEQUENCE_LENGTH,
            longest_sequence_length=LONGEST_SEQUENCE_LENGTH,
            max_images=MOST_IMAGES,
        )

    def guidance_threshold(self, checkpoint: Checkpoint) -> float:
        """Flux2KleinPipeline has no guidance, whatever its scale, for a checkpoint that says it is distilled."""
        is_distilled = is_klein(checkpoint) and checkpoint.index.get("is_distilled")
        return math.inf if is_distilled else super().guidance_threshold(checkpoint)

    def default_size(self, defaults: RequestDefaults, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """That of the first picture; raises InvalidRequestError for one that the model does not take."""
        for height, width in image_sizes:
            check_reference(height, width)
        if not image_sizes:
            return super().default_size(defaults, image_sizes)
        return cropped_size(*image_sizes[0], defaults.size_multiple)

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """2 x 2 patches of the latents."""
        size = pixels_per_token(checkpoint)
        return (request.height // size) * (request.width // size)

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """With those of the pictures that stand beside, as if each were of the largest size."""
        beside = request.num_images * LARGEST_AREA // pixels_per_token(checkpoint) ** 2
        return super().num_tokens(request, checkpoint) + beside

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads of the transformer; those of Qwen3 or Mistral, and their widths."""
        if stage_model == "denoising":
            return {"num_attention_heads": checkpoint.setting("transformer", "num_attention_heads")}
        return language_model_counts(checkpoint, "text_encoder")


FAMILY = Flux2Family()
