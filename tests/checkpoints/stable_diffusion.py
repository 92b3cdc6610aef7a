"""Stable Diffusion checkpoints in diffusers layout from the real classes: random weights in float32, under 3 MB."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn

from checkpoints.parity import Pair
from checkpoints.requests import make_request
from checkpoints.text import CLIP_TOKENS, WIDTH, make_clip, make_projected_clip, train_clip_tokenizer
from triton_diffusion.request import GenerationRequest

LATENT_CHANNELS = 4
SAMPLE_SIZE = 32
"""Pixels of a side of the default picture."""
PIXELS_PER_LATENT = 4
POOLED_WIDTH = 16
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""What the noise schedulers of all published checkpoints are trained with."""


def build_stable_diffusion_checkpoint(folder: Path, *, is_2: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights.

    is_2: as 2.1, a UNet that predicts v and has heads of one size, with DDIM; else as 1.5, with PNDM.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = train_clip_tokenizer()
        unet = {"attention_head_dim": [2, 4], "use_linear_projection": True} if is_2 else {"attention_head_dim": 4}
        StableDiffusionPipeline(
            vae=_make_vae(scaling_factor=0.18215),
            text_encoder=make_clip(tokenizer),
            tokenizer=tokenizer,
            unet=_make_unet(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=WIDTH,
                **unet,
            ),
            scheduler=(
                DDIMScheduler(**NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
                if is_2
                else PNDMScheduler(**NOISE, skip_prk_steps=True)
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def build_stable_diffusion_xl_checkpoint(
    folder: Path, *, force_zeros: bool = True, latents_mean: list[float] | None = None, seed: int = 0
) -> Path:
    """Write a checkpoint of Stable Diffusion XL into `folder`; equal arguments make equal weights.

    force_zeros: whether an absent negative prompt is zeros. latents_mean: with it, channels are scaled each by itself,
    as in Playground 2.5.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = train_clip_tokenizer()
        statistics = {} if latents_mean is None else {"latents_mean": latents_mean, "latents_std": [0.8, 1.1, 1.3, 0.9]}
        StableDiffusionXLPipeline(
            vae=_make_vae(scaling_factor=0.13025, **statistics),
            text_encoder=make_clip(tokenizer),
            text_encoder_2=make_projected_clip(tokenizer, POOLED_WIDTH),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=_make_unet(
                prompt_scale=50.0,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=WIDTH + POOLED_WIDTH,
                attention_head_dim=[2, 4],
                use_linear_projection=True,
                transformer_layers_per_block=[1, 2],
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + POOLED_WIDTH,
            ),
            scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        ).save_pretrained(folder)
    return folder


def with_noise_scheduler(checkpoint: Path, noise_scheduler: Any, folder: Path) -> Path:
    """The same weights in `folder`, under another noise scheduler."""
    shutil.copytree(checkpoint, folder)
    shutil.rmtree(folder / "scheduler")
    noise_scheduler.save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", type(noise_scheduler).__name__])
    return folder


class BothPipelines:
    """Text to image, and image to image where a picture is given, as one pipeline for `Pair`."""

    def __init__(self, text_class: Any, image_class: Any) -> None:
        self._text_class = text_class
        self._image_class = image_class

    def from_pretrained(self, folder: Path, **values: Any) -> BothPipelines:
        """Both pipelines share their components."""
        self.text = self._text_class.from_pretrained(folder, **values)
        self.image = self._image_class.from_pipe(self.text)
        return self

    def set_progress_bar_config(self, **values: Any) -> None:
        """As that of a pipeline."""
        self.text.set_progress_bar_config(**values)
        self.image.set_progress_bar_config(**values)

    def __call__(self, *, image: Image.Image | None, **arguments: Any) -> Any:
        """The result of the one that is meant."""
        if image is None:
            return self.text(**arguments)
        del arguments["height"], arguments["width"]
        return self.image(image=image, **arguments)


def stable_diffusion_pair(folder: Path) -> Pair:
    """Stages and pipelines of Stable Diffusion 1 or 2."""
    return Pair(folder, BothPipelines(StableDiffusionPipeline, StableDiffusionImg2ImgPipeline), _arguments)


def stable_diffusion_xl_pair(folder: Path) -> Pair:
    """Stages and pipelines of Stable Diffusion XL."""
    return Pair(folder, BothPipelines(StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline), _arguments)


LONG_PROMPT = "the small green square stands left of a large yellow triangle, " * 4
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def make_short_request(**values: Any) -> GenerationRequest:
    """A request of few steps and of as many tokens as CLIP has."""
    return make_request(**{"num_inference_steps": 2, "max_sequence_length": CLIP_TOKENS} | values)


def _arguments(request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        # An empty one is as good as none to us.
        "negative_prompt": request.negative_prompt or None,
        "guidance_scale": request.guidance_scale,
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "num_images_per_prompt": request.num_outputs,
        "image": images[0] if images else None,
        **({"strength": request.strength} if images else {}),
    }


def edit_json(file: Path, **values: Any) -> None:
    """Set values of a configuration file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _make_unet(prompt_scale: float = 1.0, **config: Any) -> UNet2DConditionModel:
    """prompt_scale: how large the embeddings are, about; attention that saturates would amplify rounding errors."""
    unet = UNet2DConditionModel(
        sample_size=SAMPLE_SIZE // PIXELS_PER_LATENT,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        **config,
    )
    # Freshly made, it hardly listens to prompt, timestep and size; a change of them must show in the picture.
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 2:
            is_of_prompt = name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
            gain = 1.0 / prompt_scale if is_of_prompt else 1.0
            nn.init.normal_(parameter, std=gain / parameter.shape[1] ** 0.5)
    return unet


def _make_vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SAMPLE_SIZE,
        **config,
    )
