"""A FLUX checkpoint in diffusers layout from the real classes: random weights in float32, 1.5 MB on the disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

SENTENCES = (
    "a red circle above a blue star on a gray ground",
    "the small green square stands left of a large yellow triangle",
    "two black cats sleep under an old wooden table",
    "a lighthouse at dusk, waves break on the rocks",
    "blurry, dark, low quality",
)
WIDTH = 32
CLIP_TOKENS = 20
T5_TOKENS = 48
LATENT_CHANNELS = 4
SAMPLE_SIZE = 32
"""Pixels of a side of the default picture."""
PIXELS_PER_TOKEN = 4


def build_flux_checkpoint(folder: Path, *, guidance_embeds: bool, dynamic_shift: bool, seed: int = 0) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_tokenizer, t5_tokenizer = _train_clip_tokenizer(), _make_t5_tokenizer()
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=dynamic_shift),
            vae=_make_vae(),
            text_encoder=_make_clip(clip_tokenizer),
            tokenizer=clip_tokenizer,
            text_encoder_2=_make_t5(t5_tokenizer),
            tokenizer_2=t5_tokenizer,
            transformer=_make_transformer(guidance_embeds),
        )
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    # As published FLUX checkpoints name it.
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
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


def _make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SAMPLE_SIZE,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=10.0,
        )
    )


def _make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    nn.init.normal_(encoder.shared.weight, std=1.0)
    return encoder


def _train_clip_tokenizer() -> CLIPTokenizer:
    template = CLIPTokenizer()
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = template.backend_tokenizer.normalizer
    bpe.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=600,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    vocabulary = bpe.get_vocab()
    for letter in alphabet:
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_TOKENS)


def _make_t5_tokenizer() -> T5TokenizerFast:
    words = sorted(set(re.findall(r"[a-z]+", " ".join(SENTENCES))))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -5.0) for word in words if len(word) > 1]
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    pieces += [(prefix + letter, -12.0) for letter in letters for prefix in ("", "▁")]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)
