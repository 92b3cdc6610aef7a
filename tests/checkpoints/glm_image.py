"""A GLM-Image checkpoint in diffusers layout from the real classes: random weights in float32, below 1 MB on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from torch import nn
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from checkpoints.text import WIDTH, train_byte_bpe

CODEBOOK_SIZE = 48
"""Pictures of the prior are made of these tokens; the start and the end of a picture are the two behind them."""
IMAGE_START, IMAGE_END = CODEBOOK_SIZE, CODEBOOK_SIZE + 1
LATENT_CHANNELS = 4
NUM_HEADS, HEAD_DIM = 4, 8
PIXELS_PER_TOKEN = 16
"""As in the published checkpoint, whose processor has its tokens at half this resolution built in."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"<|dit_token_{IMAGE_START}|><|image|><|dit_token_{IMAGE_END}|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def build_glm_image_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint into `folder`; equal seeds make equal weights.

    The prior never samples what is no part of a picture: with random weights, it would end its pictures early.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        processor = _make_processor()
        prior = _make_prior(processor)
        prior.generation_config = GenerationConfig(
            do_sample=True,
            temperature=0.9,
            top_p=0.75,
            top_k=CODEBOOK_SIZE,
            eos_token_id=IMAGE_END,
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=[IMAGE_START, IMAGE_END],
        )
        pipeline = GlmImagePipeline(
            tokenizer=ByT5Tokenizer(extra_ids=0),
            processor=processor,
            text_encoder=_make_text_encoder(),
            vision_language_encoder=prior,
            vae=_make_vae(),
            transformer=_make_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def _make_processor() -> GlmImageProcessor:
    special = [f"<|dit_token_{index}|>" for index in range(IMAGE_END + 1)]
    special += ["<|endoftext|>", "<|image|>", "<sop>", "<eop>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_byte_bpe(special),
        bos_token=f"<|dit_token_{IMAGE_START}|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
        padding_side="left",
    )
    image_processor = GlmImageImageProcessorPil(
        patch_size=16, merge_size=1, temporal_patch_size=1, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    )
    return GlmImageProcessor(image_processor, tokenizer, chat_template=_CHAT_TEMPLATE)


def _make_prior(processor: GlmImageProcessor) -> GlmImageForConditionalGeneration:
    tokenizer = processor.tokenizer
    prior = GlmImageForConditionalGeneration(
        GlmImageConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "vision_vocab_size": IMAGE_END + 1,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 2048,
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": IMAGE_END,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "image_size": 128,
                "patch_size": 16,
            },
            vq_config={"embed_dim": 16, "num_embeddings": CODEBOOK_SIZE, "latent_channels": 16},
            image_token_id=processor.image_token_id,
            image_start_token_id=IMAGE_START,
            image_end_token_id=IMAGE_END,
        )
    )
    _listen(prior)
    for name, parameter in prior.named_parameters():
        # Attention to a few tokens: what it sampled first makes a difference to the end.
        if name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
            parameter.data.mul_(4)
    return prior.eval()


def _make_text_encoder() -> T5EncoderModel:
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=259,
            d_model=WIDTH,
            d_kv=16,
            d_ff=WIDTH,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    nn.init.normal_(encoder.shared.weight, std=1.0)
    return encoder


def _make_transformer() -> GlmImageTransformer2DModel:
    transformer = GlmImageTransformer2DModel(
        patch_size=4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        text_embed_dim=WIDTH,
        time_embed_dim=WIDTH,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=CODEBOOK_SIZE,
    )
    _listen(transformer)
    nn.init.normal_(transformer.proj_out.weight, std=0.3 / WIDTH**0.5)
    return transformer


def _listen(model: nn.Module) -> None:
    """Freshly made, a model hardly listens to its inputs; a change of them must show in the picture."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.0 / parameter.shape[1] ** 0.5)


def _make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        latents_mean=(0.1, -0.2, 0.0, 0.3),
        latents_std=(0.8, 1.2, 1.0, 0.9),
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
