"""LTX-Video checkpoints in diffusers layout from the real classes: random weights in float32, 1 MB on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from torch import nn

from checkpoints.text import WIDTH, make_t5, make_t5_tokenizer

LATENT_CHANNELS = 8


def build_ltx_video_checkpoint(
    folder: Path,
    *,
    image_to_video: bool = False,
    timestep_conditioning: bool = False,
    dynamic_shift: bool = True,
    seed: int = 0,
) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights. A latent is 2 frames of 8 x 8 pixels.

    timestep_conditioning: as in 0.9.1, whose decoder adds noise, too.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=2.0,
        use_dynamic_shifting=dynamic_shift,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=8,
        max_image_seq_len=128,
        shift_terminal=0.1 if dynamic_shift else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = _make_vae(timestep_conditioning)
        return _build(folder, LTXImageToVideoPipeline if image_to_video else LTXPipeline, vae, scheduler)


def build_ltx_condition_checkpoint(folder: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """One like 0.9.5, for LTXConditionPipeline; `scheduler` changes its noise scheduler. A latent is as above."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _build(folder, LTXConditionPipeline, _make_vae_095(), FlowMatchEulerDiscreteScheduler(**scheduler))


def _build(
    folder: Path,
    pipeline_class: type[DiffusionPipeline],
    vae: AutoencoderKLLTXVideo,
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> Path:
    tokenizer = make_t5_tokenizer()
    pipeline = pipeline_class(
        scheduler=scheduler,
        vae=vae,
        text_encoder=make_t5(tokenizer),
        tokenizer=tokenizer,
        transformer=_make_transformer(),
    )
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    # As the published checkpoint names it.
    index.write_text(index.read_text().replace(f'"{type(tokenizer).__name__}"', '"T5TokenizerFast"'))
    return folder


def _make_transformer() -> LTXVideoTransformer3DModel:
    """A width that 6 does not divide: the rotary embeddings are padded, as in the real one."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=4 * 8,
        num_layers=2,
        caption_channels=WIDTH,
    )
    # Freshly made, it hardly listens to prompt and timestep; a change of them must show in the video.
    for name, parameter in transformer.named_parameters():
        if name.endswith((".norm_q.weight", ".norm_k.weight")):
            nn.init.normal_(parameter, mean=1.0, std=0.3)
        elif parameter.ndim == 2 and not name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=(0.5 if name == "proj_out.weight" else 1.0) / parameter.shape[1] ** 0.5)
    return transformer


def _make_vae(timestep_conditioning: bool) -> AutoencoderKLLTXVideo:
    # With a timestep, the widths of a block must not change inside it.
    blocks = 1 if timestep_conditioning else 2
    vae = AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        downsample_type=("conv",) * 2,
        decoder_block_out_channels=(8, 16)[-blocks:],
        decoder_layers_per_block=(1, 1, 1)[-blocks - 1 :],
        decoder_spatio_temporal_scaling=(True, False)[:blocks],
        decoder_inject_noise=(timestep_conditioning,) * (blocks + 1),
        upsample_residual=(timestep_conditioning,) * blocks,
        upsample_factor=(2 if timestep_conditioning else 1,) * blocks,
        timestep_conditioning=timestep_conditioning,
        scaling_factor=1.3,
    )
    return _with_statistics(vae)


def _make_vae_095() -> AutoencoderKLLTXVideo:
    """Downsampled by rearranging pixels, and one side at a time; its decoder takes a timestep, and adds no noise."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16, 16),
        down_block_types=("LTXVideo095DownBlock3D",) * 2,
        layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        downsample_type=("spatial", "temporal"),
        decoder_block_out_channels=(16,),
        decoder_layers_per_block=(1, 1),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        upsample_residual=(True,),
        upsample_factor=(2,),
        timestep_conditioning=True,
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    )
    return _with_statistics(vae)


def _with_statistics(vae: AutoencoderKLLTXVideo) -> AutoencoderKLLTXVideo:
    nn.init.normal_(vae.latents_mean, std=0.3)
    nn.init.uniform_(vae.latents_std, 0.5, 2.0)
    for name, parameter in vae.named_parameters():
        if ".per_channel_scale" in name:
            nn.init.normal_(parameter, std=0.5)
    return vae
