"""Stable Diffusion as the Triton processes know it, from the checkpoint's configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

# diffusers' pipelines refuse other sizes.
SIZE_MULTIPLE = 8


def pixels_per_latent(checkpoint: Checkpoint) -> int:
    """Pixels along one side of the square that one latent pixel stands for."""
    halvings = len(checkpoint.setting("vae", "block_out_channels")) - 1
    size: int = 2**halvings
    return size


class StableDiffusionFamily(ModelFamily):
    """Stable Diffusion 1 and 2, and checkpoints trained from them.

    A checkpoint may name a safety_checker and a feature_extractor: they are not loaded, and no picture is held back.
    Who serves the public must judge pictures behind this server.
    """

    name = "stable_diffusion"
    pipeline_classes = ("StableDiffusionPipeline",)
    tasks = ("text-to-image", "image-to-image")
    denoisers = ()
    text_components: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    guidance_scale: ClassVar[float] = 7.5
    strength: ClassVar[float] = 0.8

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """The autoencoder reads the picture that is changed, too."""
        return {
            "image_encoding": ("vae",),
            "text_encoding": self.text_components,
            "denoising": ("scheduler", "unet"),
            "decoding": ("vae",),
        }

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """The pipeline's own defaults; the size is the one that the UNet was trained at.

        CLIP always reads as many tokens as its tokenizer says, unless a request wants fewer.

        Raises:
            ConfigurationError: the UNet takes more than latents and a prompt.
        """
        _check_unet(checkpoint)
        sample_size = checkpoint.setting("unet", "sample_size")
        height, width = [sample_size] * 2 if isinstance(sample_size, int) else sample_size
        text_length = int(checkpoint.setting("tokenizer", "model_max_length", "tokenizer_config.json"))
        size = pixels_per_latent(checkpoint)
        return RequestDefaults(
            height=height * size,
            width=width * size,
            size_multiple=max(SIZE_MULTIPLE, size),
            num_inference_steps=50,
            guidance_scale=self.guidance_scale,
            embedded_guidance_scale=None,
            max_sequence_length=text_length,
            longest_sequence_length=text_length,
            strength=self.strength,
            max_images=1,
        )

    def default_size(self, defaults: RequestDefaults, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """That of the picture that is changed, rounded down, as the img2img pipelines have it."""
        if not image_sizes:
            return super().default_size(defaults, image_sizes)
        multiple = defaults.size_multiple
        height, width = (max(multiple, side // multiple * multiple) for side in image_sizes[0])
        return height, width

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Latent pixels: the UNet's highest resolution."""
        size = pixels_per_latent(checkpoint)
        return (request.height // size) * (request.width // size)

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """None: neither UNet nor CLIP is divided."""
        return {}


def _check_unet(checkpoint: Checkpoint) -> None:
    config = checkpoint.config("unet")
    channels, latent_channels = (
        checkpoint.setting(*names) for names in (("unet", "in_channels"), ("vae", "latent_channels"))
    )
    if channels != latent_channels:
        raise ConfigurationError(
            f"{checkpoint.component_path('unet')} takes in_channels={channels}, and the autoencoder has "
            f"{latent_channels}: it wants a mask or a depth map beside the prompt, which is not served"
        )
    if config.get("time_cond_proj_dim") is not None:
        raise ConfigurationError(
            f"{checkpoint.component_path('unet')} has time_cond_proj_dim={config['time_cond_proj_dim']}: a UNet that "
            "is distilled to take its guidance scale (latent consistency) is not served"
        )


FAMILY = StableDiffusionFamily()
