"""Wan checkpoints in diffusers layout from the real classes: random weights in float32, about 1 MB on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from checkpoints.text import WIDTH, make_t5_tokenizer

Kind = Literal["t2v", "i2v", "first_last", "experts", "experts_i2v", "ti2v"]
"""Wan 2.1 text to video, image to video, and first and last frame to video; Wan 2.2 with two transformers for text
and for pictures, and the one that takes a picture as its first frame or none."""

LATENT_CHANNELS = 4
TEMPORAL = 4
CLIP_SIZE, CLIP_PATCH = 32, 16
NUM_CLIP_TOKENS = (CLIP_SIZE // CLIP_PATCH) ** 2 + 1
BOUNDARY_RATIO = 0.8
FLOW_SHIFT = 3.0


def build_wan_checkpoint(folder: Path, kind: Kind, *, euler: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights.

    euler: with the noise scheduler that the pipelines name, instead of UniPC, which the published checkpoints have.
    """
    experts = kind in ("experts", "experts_i2v")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_t5_tokenizer()
        components: dict[str, Any] = {
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT) if euler else _make_unipc(),
            "vae": _make_vae(residual=kind == "ti2v"),
            "text_encoder": _make_umt5(tokenizer),
            "tokenizer": tokenizer,
            "transformer": _make_transformer(kind),
            "transformer_2": _make_transformer(kind) if experts else None,
            "boundary_ratio": BOUNDARY_RATIO if experts else None,
            "expand_timesteps": kind == "ti2v",
        }
        if kind in ("i2v", "first_last"):
            size = {"height": CLIP_SIZE, "width": CLIP_SIZE}
            components["image_processor"] = CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=size)
            components["image_encoder"] = _make_clip_vision()
    takes_picture = kind in ("i2v", "first_last", "experts_i2v")
    pipeline = (WanImageToVideoPipeline if takes_picture else WanPipeline)(**components)
    pipeline.save_pretrained(folder)
    if kind in ("i2v", "first_last"):
        _add_unused_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    index = folder / "model_index.json"
    # As published checkpoints name it.
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    return folder


def _make_unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)


def _make_transformer(kind: Kind) -> WanTransformer3DModel:
    has_condition = kind in ("i2v", "first_last", "experts_i2v")
    has_clip = kind in ("i2v", "first_last")
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=LATENT_CHANNELS + has_condition * (LATENT_CHANNELS + TEMPORAL),
        out_channels=LATENT_CHANNELS,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=WIDTH if has_clip else None,
        added_kv_proj_dim=32 if has_clip else None,
        rope_max_seq_len=64,
        pos_embed_seq_len=2 * NUM_CLIP_TOKENS if kind == "first_last" else None,
    )
    # Freshly made, it hardly listens to prompt, picture and timestep; a change of them must show in the video.
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.0 / parameter.shape[1] ** 0.5)
        elif "norm" in name or name.endswith("pos_embed"):
            # All heads alike, and all zeros.
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return transformer


def _add_unused_weights(file: Path) -> None:
    """As published checkpoints have them."""
    unused = {f"blocks.{index}.attn2.norm_added_q.weight": torch.ones(32) for index in range(2)}
    save_file(load_file(file) | unused, file, metadata={"format": "pt"})


def _make_vae(*, residual: bool) -> AutoencoderKLWan:
    """4 pixels a latent pixel as in Wan 2.1, only fewer; 8 as in TI2V, of which patches make 2."""
    patch = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True} if residual else {}
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[-0.3, 0.1, 0.2, -0.1],
        latents_std=[1.3, 0.8, 1.1, 0.9],
        scale_factor_temporal=TEMPORAL,
        scale_factor_spatial=8 if residual else 4,
        **patch,
    )
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            nn.init.normal_(parameter, std=1.0 / parameter[0].numel() ** 0.5)
    return vae


def _make_umt5(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    nn.init.normal_(encoder.shared.weight, std=1.0)
    for name, parameter in encoder.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=1.0)
    return encoder


def _make_clip_vision() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=CLIP_SIZE,
            patch_size=CLIP_PATCH,
            initializer_factor=10.0,
        )
    )
