"""Stable Diffusion XL as the Triton processes know it, from the checkpoint's configuration files alone."""

from __future__ import annotations

from triton_diffusion.families.stable_diffusion.family import StableDiffusionFamily


class StableDiffusionXLFamily(StableDiffusionFamily):
    """The base model of Stable Diffusion XL, and checkpoints trained from it; the refiner is another pipeline.

    Pictures have no watermark: diffusers adds one only where the package invisible-watermark is installed.
    """

    name = "stable_diffusion_xl"
    pipeline_classes = ("StableDiffusionXLPipeline",)
    text_components = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    guidance_scale = 5.0
    strength = 0.3


FAMILY = StableDiffusionXLFamily()
