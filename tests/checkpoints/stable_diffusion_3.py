"""Stable Diffusion 3 checkpoints in diffusers layout from the real classes: random weights in float32, under 2 MB."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn

from checkpoints.text import make_projected_clip, make_t5, make_t5_tokenizer, train_clip_tokenizer

LATENT_CHANNELS = 4
SAMPLE_SIZE = 32
"""Pixels of a side of the default picture."""
PIXELS_PER_TOKEN = 4
LARGEST_SIDE = 96
"""Pixels: the transformer has learnt no positions beyond."""
CLIP_WIDTHS = (16, 32)
T5_WIDTH = 64
"""More than both CLIPs together, so that they are filled up with zeros."""


def build_stable_diffusion_3_checkpoint(
    folder: Path, *, with_t5: bool = True, is_3_5: bool = False, dynamic_shift: bool = False, seed: int = 0
) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights.

    is_3_5: with normed queries and keys, and a second attention over the image in one block, as 3.5 medium.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_tokenizer, t5_tokenizer = train_clip_tokenizer(), make_t5_tokenizer()
        clips = [make_projected_clip(clip_tokenizer, width) for width in CLIP_WIDTHS]
        pipeline = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
            vae=_make_vae(),
            text_encoder=clips[0],
            tokenizer=clip_tokenizer,
            text_encoder_2=clips[1],
            tokenizer_2=clip_tokenizer,
            text_encoder_3=make_t5(t5_tokenizer, T5_WIDTH) if with_t5 else None,
            tokenizer_3=t5_tokenizer if with_t5 else None,
            transformer=_make_transformer(is_3_5),
        )
    pipeline.save_pretrained(folder)
    return folder


def _make_transformer(is_3_5: bool) -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=SAMPLE_SIZE // 2,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=LARGEST_SIDE // PIXELS_PER_TOKEN,
        dual_attention_layers=(0,) if is_3_5 else (),
        qk_norm="rms_norm" if is_3_5 else None,
    )
    # Freshly made, it hardly listens to prompt and timestep; a change of them must show in the picture. With larger
    # weights, rounding errors show, too.
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=(0.2 if name == "proj_out.weight" else 0.7) / parameter.shape[1] ** 0.5)
    return transformer


def _make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SAMPLE_SIZE,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
