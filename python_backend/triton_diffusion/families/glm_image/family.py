"""GLM-Image as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

# Pixels of a side of what one token of the prior stands for: a constant of transformers' GlmImageProcessor.
PIXELS_PER_PRIOR_TOKEN = 32
# The transformer has four tokens for each of the prior's.
UPSAMPLING = 2
# Latent pixels of a side of the default picture (GlmImagePipeline.default_sample_size).
DEFAULT_SAMPLE_SIZE = 128
# The pipeline has no limit. Keys and values of one picture of 1024 x 1024 are 1.2 GiB in the published checkpoint.
MAX_IMAGES = 4
LONGEST_SEQUENCE_LENGTH = 2048

_QUOTED = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"「([^「」]*)」")


def glyph_texts(prompt: str) -> list[str]:
    """What stands in quotation marks, to be written in the picture, in the order of GlmImagePipeline.get_glyph_texts.

    The text encoder reads nothing else of a prompt; what the picture shows is settled by the prior.
    """
    return [text for pattern in _QUOTED for text in re.findall(pattern, prompt)]


def vae_scale(checkpoint: Checkpoint) -> int:
    """Pixels along one side of a latent pixel."""
    scale: int = 2 ** (len(checkpoint.setting("vae", "block_out_channels")) - 1)
    return scale


class GlmImageFamily(ModelFamily):
    """GLM-Image: text to image, and pictures to image."""

    name = "glm_image"
    pipeline_classes = ("GlmImagePipeline",)
    tasks = ("text-to-image", "image-to-image")
    own_processors = True
    padded: ClassVar[Mapping[str, str]] = {"prompt_embeds": "prompt_embeds_mask"}

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """The prior is a stage model of its own: it has more weights than all else, and works in another way."""
        return {
            "prior_generation": ("processor", "vision_language_encoder"),
            "image_encoding": ("vae",),
            "text_encoding": ("tokenizer", "text_encoder"),
            "denoising": ("scheduler", "transformer"),
            "decoding": ("vae",),
        }

    def encoders(self, request: GenerationRequest) -> tuple[str, ...]:
        """The prior first: it is what refuses pictures that do not fit."""
        return ("prior_generation", *super().encoders(request))

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """GlmImagePipeline's own defaults.

        Raises:
            ConfigurationError: the transformer's tokens are not of the size that the prior draws up.
        """
        scale = vae_scale(checkpoint)
        pixels, expected = scale * checkpoint.setting("transformer", "patch_size"), PIXELS_PER_PRIOR_TOKEN // UPSAMPLING
        if pixels != expected:
            raise ConfigurationError(
                f"{checkpoint.path}: a token of the transformer is {pixels} pixels wide, and the prior draws up "
                f"{expected}; the vae and the transformer must belong to the same GlmImagePipeline"
            )
        return RequestDefaults(
            height=DEFAULT_SAMPLE_SIZE * scale,
            width=DEFAULT_SAMPLE_SIZE * scale,
            size_multiple=PIXELS_PER_PRIOR_TOKEN,
            num_inference_steps=50,
            guidance_scale=1.5,
            embedded_guidance_scale=None,
            max_sequence_length=LONGEST_SEQUENCE_LENGTH,
            longest_sequence_length=LONGEST_SEQUENCE_LENGTH,
            max_images=MAX_IMAGES,
        )

    def default_size(self, defaults: RequestDefaults, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """That of the first picture, rounded down."""
        if not image_sizes:
            return defaults.height, defaults.width
        multiple = defaults.size_multiple
        height, width = (max(multiple, side // multiple * multiple) for side in image_sizes[0])
        return height, width

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Patches of the latents."""
        size = PIXELS_PER_PRIOR_TOKEN // UPSAMPLING
        return (request.height // size) * (request.width // size)

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Only quoted words are text tokens, a byte each. The sizes of pictures are not known here, they are taken to
        be that of the output.
        """
        num_text_tokens = sum(len(text.encode()) + 1 for text in glyph_texts(request.prompt))
        return num_text_tokens + (1 + request.num_images) * self.num_image_tokens(request, checkpoint)

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads of the transformer; heads and feed-forward of T5. The prior runs on one rank."""
        if stage_model == "denoising":
            return {"num_attention_heads": checkpoint.setting("transformer", "num_attention_heads")}
        return {name: checkpoint.setting("text_encoder", name) for name in ("num_heads", "d_ff")}


FAMILY = GlmImageFamily()
