"""A FLUX checkpoint in diffusers layout from the real classes: random weights in float32, 1.5 MB on the disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

from checkpoints.text import WIDTH, make_clip, make_t5, make_t5_tokenizer, train_clip_tokenizer

LATENT_CHANNELS = 4
SAMPLE_SIZE = 32
"""Pixels of a side of the default picture."""
PIXELS_PER_TOKEN = 4


def build_flux_checkpoint(
    folder: Path,
    *,
    guidance_embeds: bool,
    dynamic_shift: bool,
    seed: int = 0,
    pipeline_class: str = "FluxPipeline",
    vae_levels: int = 2,
) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights.

    pipeline_class: that the checkpoint names. vae_levels: each but the first halves the sides of a picture.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_tokenizer, t5_tokenizer = train_clip_tokenizer(), make_t5_tokenizer()
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=dynamic_shift),
            vae=_make_vae(vae_levels),
            text_encoder=make_clip(clip_tokenizer),
            tokenizer=clip_tokenizer,
            text_encoder_2=make_t5(t5_tokenizer),
            tokenizer_2=t5_tokenizer,
            transformer=_make_transformer(guidance_embeds),
        )
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    # As published FLUX checkpoints name it.
    names = index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"')
    index.write_text(names.replace('"FluxPipeline"', f'"{pipeline_class}"'))
    return folder


def _make_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    # Freshly made, it hardly listens to prompt, timestep and guidance; a change of them must show in the picture.
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=(0.3 if name == "proj_out.weight" else 1.0) / parameter.shape[1] ** 0.5)
    return transformer


def _make_vae(levels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) + (16,) * (levels - 1),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SAMPLE_SIZE,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
