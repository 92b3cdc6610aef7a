"""FLUX.2 checkpoints in diffusers layout from the real classes: random weights in float32, under 2 MB on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from checkpoints.text import train_byte_bpe

LATENT_CHANNELS = 4
PIXELS_PER_TOKEN = 4
TEXT_WIDTH = 16
NUM_HEADS, HEAD_DIM = 4, 8

_KLEIN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_KLEIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
_MISTRAL_TOKENS = ("<pad>", "<s>", "</s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]")
_MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'system' %}{{ message.content[0].text }}"
    "{% else %}{{ '[INST]' + message.content[0].text + '[/INST]' }}{% endif %}{% endfor %}"
)


def build_klein_checkpoint(folder: Path, *, is_distilled: bool = False, seed: int = 0) -> Path:
    """FLUX.2-klein, with Qwen3; equal arguments make equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_byte_bpe(_KLEIN_TOKENS),
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            chat_template=_KLEIN_TEMPLATE,
        )
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=TEXT_WIDTH,
                num_hidden_layers=28,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_make_vae(),
            text_encoder=_listening(encoder),
            tokenizer=tokenizer,
            transformer=_make_transformer(guidance_embeds=False),
            is_distilled=is_distilled,
        )
    pipeline.save_pretrained(folder)
    return folder


def build_flux2_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """FLUX.2-dev, with Mistral 3; equal arguments make equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_byte_bpe(_MISTRAL_TOKENS, sentences=(SYSTEM_MESSAGE,), vocab_size=500),
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            padding_side="left",
            chat_template=_MISTRAL_TEMPLATE,
        )
        encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config=MistralConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=TEXT_WIDTH,
                    intermediate_size=TEXT_WIDTH,
                    num_hidden_layers=31,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=8,
                    pad_token_id=tokenizer.pad_token_id,
                ),
                vision_config=PixtralVisionConfig(
                    hidden_size=TEXT_WIDTH,
                    intermediate_size=TEXT_WIDTH,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    head_dim=8,
                ),
                image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
            )
        )
        pipeline = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_make_vae(),
            text_encoder=_listening(encoder),
            tokenizer=tokenizer,
            transformer=_make_transformer(guidance_embeds=True),
        )
    pipeline.save_pretrained(folder)
    # As published: a PixtralProcessor, of which only the tokenizer is used.
    index = folder / "model_index.json"
    content = json.loads(index.read_text()) | {"tokenizer": ["transformers", "PixtralProcessor"]}
    index.write_text(json.dumps(content, indent=2))
    return folder


def _make_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    _listening(transformer)
    nn.init.normal_(transformer.proj_out.weight, std=0.3 / (NUM_HEADS * HEAD_DIM) ** 0.5)
    return transformer


def _listening(model: nn.Module) -> nn.Module:
    """Freshly made, a model hardly listens to its inputs; a change of them must show in the picture."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.8 / parameter.shape[1] ** 0.5)
    return model


def _make_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        # So large that it shows.
        batch_norm_eps=0.1,
    )
    # What it has learnt of its latents.
    nn.init.normal_(vae.bn.running_mean, std=0.5)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return vae
