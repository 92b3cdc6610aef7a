"""A Z-Image checkpoint in diffusers layout from the real classes: random weights in float32, under 1 MB on the disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from checkpoints.text import WIDTH, train_byte_bpe

LATENT_CHANNELS = 4
NUM_HEADS, HEAD_DIM = 4, 12
PIXELS_PER_TOKEN = 4
LONGEST_PROMPT = 160

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)


def build_z_image_checkpoint(folder: Path, *, dynamic_shift: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _make_tokenizer()
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
            vae=_make_vae(),
            text_encoder=_make_text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=_make_transformer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def _make_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=train_byte_bpe(_SPECIAL_TOKENS),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=_CHAT_TEMPLATE,
        padding_side="right",
    )


def _make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Qwen3Model:
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _listen(encoder)
    return encoder


def _make_transformer() -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=NUM_HEADS * HEAD_DIM,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=NUM_HEADS,
        n_kv_heads=NUM_HEADS,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[LONGEST_PROMPT + 2, 32, 32],
    )
    _listen(transformer)
    # What fills up text and image is learnt; zeros would look like padding.
    nn.init.normal_(transformer.x_pad_token)
    nn.init.normal_(transformer.cap_pad_token)
    return transformer


def _listen(model: nn.Module) -> None:
    """Freshly made, a model hardly listens to its inputs; a change of them must show in the picture."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.0 / parameter.shape[1] ** 0.5)


def _make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
