"""A HunyuanVideo checkpoint in diffusers layout from the real classes: random weights in float32, 2 MB on the disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from checkpoints.text import WIDTH, make_clip, train_byte_bpe, train_clip_tokenizer

LATENT_CHANNELS = 4
# The pipeline asks CLIP's tokenizer for this many.
CLIP_TOKENS = 77
SPECIAL_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>")


def build_hunyuan_video_checkpoint(folder: Path, *, guidance_embeds: bool = True, seed: int = 0) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights. A latent is 4 frames of 4 x 4 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, clip_tokenizer = make_llama_tokenizer(), train_clip_tokenizer()
        clip_tokenizer.model_max_length = CLIP_TOKENS
        clip = make_clip(clip_tokenizer).config.to_dict() | {"max_position_embeddings": CLIP_TOKENS}
        pipeline = HunyuanVideoPipeline(
            text_encoder=_make_llama(tokenizer),
            tokenizer=tokenizer,
            transformer=_make_transformer(guidance_embeds),
            vae=_make_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=CLIPTextModel(CLIPTextConfig(**clip)),
            tokenizer_2=clip_tokenizer,
        )
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    # As the published checkpoint names it.
    name = type(tokenizer).__name__
    index.write_text(index.read_text().replace(f'"{name}"', '"LlamaTokenizerFast"'))
    return folder


def make_llama_tokenizer() -> PreTrainedTokenizerFast:
    """As LLaMA 3's; the template is as long as with the real one."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_byte_bpe(
            SPECIAL_TOKENS, sentences=[DEFAULT_PROMPT_TEMPLATE["template"]], vocab_size=600
        ),
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=512,
    )


def _make_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    """Of its four layers two count."""
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    for parameter in llama.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.0 / WIDTH**0.5)
    nn.init.normal_(llama.embed_tokens.weight, std=1.0)
    return llama


def _make_transformer(guidance_embeds: bool) -> HunyuanVideoTransformer3DModel:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        guidance_embeds=guidance_embeds,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
    )
    # Freshly made, it hardly listens to prompt, timestep and guidance; a change of them must show in the video.
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=(0.5 if name == "proj_out.weight" else 1.0) / parameter.shape[1] ** 0.5)
    return transformer


def _make_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
