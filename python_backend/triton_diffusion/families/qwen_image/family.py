"""Qwen-Image as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from triton_diffusion.errors import ConfigurationError, InvalidRequestError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.families.language_models import language_model_counts
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

if TYPE_CHECKING:
    import torch

# The transformer takes 2 x 2 latent pixels as one token (latents.PATCH_SIZE, whose module needs torch).
PATCH_SIZE = 2
# Latent pixels along a side of the default picture.
DEFAULT_LATENT_SIZE = 128
# The pipelines refuse a higher max_sequence_length.
LONGEST_SEQUENCE_LENGTH = 1024
# Pixels of a picture that is edited, as the autoencoder gets it; the output is as large, if nothing else is asked for.
PICTURE_AREA = 1024 * 1024
# Sides of an edited picture are multiples of this.
PICTURE_MULTIPLE = 32
# Qwen2.5-VL's processor refuses a picture of which one side is more than so many times the other.
NARROWEST = 200
# The pixels that the text encoder sees of each picture, and how many pictures the model was made for.
PROMPT_PICTURES = {"QwenImageEditPipeline": (PICTURE_AREA, 1), "QwenImageEditPlusPipeline": (384 * 384, 3)}
# What transformers may be configured to need, and the pipelines of this family do not give.
UNKNOWN_INPUTS = ("guidance_embeds", "use_additional_t_cond")


def compression(checkpoint: Checkpoint) -> int:
    """Pixels along one side of a latent pixel."""
    halvings = len(checkpoint.setting("vae", "temperal_downsample"))
    return 1 << halvings


def pixels_per_token(checkpoint: Checkpoint) -> int:
    """Pixels along one side of the square that one token stands for."""
    return PATCH_SIZE * compression(checkpoint)


def fitted_size(area: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of about `area` pixels with the sides of a picture in proportion (calculate_dimensions).

    Raises:
        InvalidRequestError: the picture is so narrow that the text encoder cannot see it.
    """
    ratio = width / height
    side = math.sqrt(area * ratio)
    # Python rounds halves to even numbers, as the pipelines do.
    fitted_width, fitted_height = (round(exact / PICTURE_MULTIPLE) * PICTURE_MULTIPLE for exact in (side, side / ratio))
    if max(fitted_height, fitted_width) > NARROWEST * min(fitted_height, fitted_width):
        raise InvalidRequestError(
            f"a picture of {height} x {width} pixels (height x width) is too narrow; cut it to less than "
            f"{NARROWEST // 2} times as long as wide"
        )
    return fitted_height, fitted_width


class QwenImageFamily(ModelFamily):
    """Qwen-Image, Qwen-Image-Edit, its successors that take several pictures (2509 and 2511), and what is trained from
    them.
    """

    name = "qwen_image"
    pipeline_classes = ("QwenImagePipeline", *PROMPT_PICTURES)
    tasks = ("text-to-image", "image-to-image")
    padded: ClassVar[Mapping[str, str]] = {"prompt_embeds": "prompt_embeds_mask"}
    text_encoder_sees_images = True

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """Qwen2.5-VL, whose image processor encode.py reads itself; one transformer; the autoencoder, to edit twice."""
        stages = {
            "text_encoding": ("tokenizer", "text_encoder"),
            "denoising": ("scheduler", "transformer"),
            "decoding": ("vae",),
        }
        return {"image_encoding": ("vae",), **stages} if checkpoint.pipeline_class in PROMPT_PICTURES else stages

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """Those of the pipelines; max_sequence_length has no effect where pictures are edited, as in theirs.

        Raises:
            ConfigurationError: the transformer needs what none of the pipelines gives it.
        """
        transformer = checkpoint.config("transformer")
        if needed := [name for name in UNKNOWN_INPUTS if transformer.get(name)]:
            raise ConfigurationError(
                f"the transformer of {checkpoint.path} is configured with {' and '.join(needed)}, which "
                f"{checkpoint.pipeline_class} has no input for; use a checkpoint without"
            )
        multiple = pixels_per_token(checkpoint)
        _, max_images = PROMPT_PICTURES.get(checkpoint.pipeline_class, (0, 0))
        size = math.isqrt(PICTURE_AREA) if max_images else DEFAULT_LATENT_SIZE * compression(checkpoint)
        return RequestDefaults(
            height=size // multiple * multiple,
            width=size // multiple * multiple,
            size_multiple=multiple,
            num_inference_steps=50,
            guidance_scale=4.0,
            embedded_guidance_scale=None,
            max_sequence_length=512,
            longest_sequence_length=LONGEST_SEQUENCE_LENGTH,
            min_images=min(1, max_images),
            max_images=max_images,
        )

    def default_size(self, defaults: RequestDefaults, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """About a million pixels in the proportions of the last picture."""
        if not image_sizes:
            return super().default_size(defaults, image_sizes)
        height, width = fitted_size(PICTURE_AREA, *image_sizes[-1])
        multiple = defaults.size_multiple
        return height // multiple * multiple, width // multiple * multiple

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """2 x 2 patches of the latents."""
        size = pixels_per_token(checkpoint)
        return (request.height // size) * (request.width // size)

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Each picture that is edited counts twice: as latents, and as a part of the prompt."""
        prompt_area, _ = PROMPT_PICTURES.get(checkpoint.pipeline_class, (0, 0))
        vision = checkpoint.setting("text_encoder", "vision_config")
        side = int(vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2))
        seen = prompt_area // side**2
        edited = PICTURE_AREA // pixels_per_token(checkpoint) ** 2
        return super().num_tokens(request, checkpoint) + request.num_images * (seen + edited)

    def mix_guidance(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
        """Classifier-free guidance that leaves each token (1, S, C) as long as the conditional prediction has it."""
        mixed = super().mix_guidance(conditional, unconditional, scale)
        rescaled: torch.Tensor = mixed * (conditional.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
        return rescaled

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads of the transformer; those of Qwen2.5-VL, and their widths, for words and for pictures."""
        if stage_model == "denoising":
            return {"num_attention_heads": checkpoint.setting("transformer", "num_attention_heads")}
        vision = checkpoint.setting("text_encoder", "vision_config")
        names = ("num_heads", "intermediate_size", "hidden_size")
        seen = {f"vision_config.{name}": int(vision[name]) for name in names if name in vision}
        return language_model_counts(checkpoint, "text_encoder") | seen


FAMILY = QwenImageFamily()
