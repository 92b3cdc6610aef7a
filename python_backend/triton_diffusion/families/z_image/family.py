"""Z-Image as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.families.language_models import language_model_counts
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

if TYPE_CHECKING:
    import torch

# The pipeline's: the transformer can do with others, but is called with this one.
PATCH_SIZE = 2
# The transformer fills up text and image, each by itself, to a multiple of this many tokens.
TOKEN_MULTIPLE = 32
DEFAULT_SEQUENCE_LENGTH = 512


def vae_scale(checkpoint: Checkpoint) -> int:
    """Pixels along one side of a latent pixel."""
    scale: int = 2 ** (len(checkpoint.setting("vae", "block_out_channels")) - 1)
    return scale


class ZImageFamily(ModelFamily):
    """Z-Image and Z-Image-Turbo."""

    name = "z_image"
    pipeline_classes = ("ZImagePipeline",)
    tasks = ("text-to-image", "image-to-image")
    padded: ClassVar[Mapping[str, str]] = {"prompt_embeds": "prompt_embeds_mask"}

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """One text encoder, one transformer."""
        return {
            "image_encoding": ("vae",),
            "text_encoding": ("tokenizer", "text_encoder"),
            "denoising": ("scheduler", "transformer"),
            "decoding": ("vae",),
        }

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """The own defaults of ZImagePipeline, and of ZImageImg2ImgPipeline for requests that bring a picture; the shift
        is the scheduler's, the longest prompt has positions to the end.

        No file tells the distilled checkpoint (Turbo) from the other: it wants num_inference_steps=9 and
        guidance_scale=0 of each request.
        """
        schedule = checkpoint.config("scheduler", "scheduler_config.json")
        # Text has the positions 1 to its length, and the image the one behind them.
        positions = int(checkpoint.setting("transformer", "axes_lens")[0])
        longest = (positions - 2) // TOKEN_MULTIPLE * TOKEN_MULTIPLE
        return RequestDefaults(
            height=1024,
            width=1024,
            size_multiple=PATCH_SIZE * vae_scale(checkpoint),
            num_inference_steps=50,
            guidance_scale=5.0,
            embedded_guidance_scale=None,
            max_sequence_length=min(DEFAULT_SEQUENCE_LENGTH, longest),
            longest_sequence_length=longest,
            flow_shift=None if schedule.get("use_dynamic_shifting") else float(schedule.get("shift", 1.0)),
            strength=0.6,
            max_images=1,
        )

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """2 x 2 patches of the latents, filled up."""
        size = PATCH_SIZE * vae_scale(checkpoint)
        num_patches = (request.height // size) * (request.width // size)
        return num_patches + -num_patches % TOKEN_MULTIPLE

    def guidance_threshold(self, checkpoint: Checkpoint) -> float:
        """0: see mix_guidance."""
        return 0.0

    def mix_guidance(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
        """As ZImagePipeline: from the conditional prediction on, so that 1 steers as 2 does elsewhere."""
        return conditional + scale * (conditional - unconditional)

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads of the transformer, and its feed-forward, whose size is not in the configuration; those of Qwen3."""
        if stage_model != "denoising":
            return language_model_counts(checkpoint, "text_encoder")
        return {
            "n_heads": checkpoint.setting("transformer", "n_heads"),
            "dim / 3 * 8": int(checkpoint.setting("transformer", "dim") / 3 * 8),
        }

    def head_dim(self, config: Mapping[str, Any]) -> int:
        """The configuration has the size of all heads together."""
        return int(config["dim"]) // int(config["n_heads"])


FAMILY = ZImageFamily()
