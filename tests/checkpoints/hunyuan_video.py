"""HunyuanVideo checkpoints in diffusers layout from the real classes: random weights in float32, 2 MB on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from checkpoints.text import WIDTH, make_clip, train_byte_bpe, train_clip_tokenizer

ImageCondition = Literal["latent_concat", "token_replace"]
"""How the transformer is told of a picture."""

LATENT_CHANNELS = 4
# The pipeline asks CLIP's tokenizer for this many.
CLIP_TOKENS = 77
SPECIAL_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>")
BEGIN, IMAGE_TOKEN = "<|begin_of_text|>", "<image>"
PICTURE_TEMPLATE: str = pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE["template"]
# The pipeline counts on so many patches along a side of a picture.
VISION_PATCHES, VISION_PATCH_SIZE = 24, 2


def build_hunyuan_video_checkpoint(folder: Path, *, guidance_embeds: bool = True, seed: int = 0) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights. A latent is 4 frames of 4 x 4 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_llama_tokenizer()
        pipeline = HunyuanVideoPipeline(
            text_encoder=_initialized(LlamaModel(_llama_config(tokenizer))),
            tokenizer=tokenizer,
            transformer=_make_transformer(guidance_embeds=guidance_embeds),
            **_common_components(),
        )
    return _save(pipeline, folder)


def build_hunyuan_image_to_video_checkpoint(folder: Path, condition: ImageCondition, *, seed: int = 0) -> Path:
    """The same for videos that begin with a picture; as published, only the one of "token_replace" embeds guidance."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_llava_tokenizer()
        size = {"height": VISION_PATCHES * VISION_PATCH_SIZE, "width": VISION_PATCHES * VISION_PATCH_SIZE}
        pipeline = HunyuanVideoImageToVideoPipeline(
            text_encoder=_make_llava(tokenizer),
            tokenizer=tokenizer,
            transformer=_make_transformer(guidance_embeds=condition == "token_replace", condition=condition),
            image_processor=CLIPImageProcessor(size={"shortest_edge": size["height"]}, crop_size=size),
            **_common_components(),
        )
    return _save(pipeline, folder)


def _common_components() -> dict[str, Any]:
    clip_tokenizer = train_clip_tokenizer()
    clip_tokenizer.model_max_length = CLIP_TOKENS
    clip = make_clip(clip_tokenizer).config.to_dict() | {"max_position_embeddings": CLIP_TOKENS}
    return {
        "vae": _make_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": CLIPTextModel(CLIPTextConfig(**clip)),
        "tokenizer_2": clip_tokenizer,
    }


def _save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    # As the published checkpoints name it.
    name = type(pipeline.tokenizer).__name__
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


def make_llava_tokenizer() -> PreTrainedTokenizerFast:
    """As that of LLaVA on LLaMA 3, with its rules: the template is as long, and has the picture at the same place."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    bpe = train_byte_bpe(
        (BEGIN, *SPECIAL_TOKENS, IMAGE_TOKEN),
        sentences=[PICTURE_TEMPLATE],
        vocab_size=700,
        pre_tokenizer=pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=2048,
    )


def _llama_config(tokenizer: PreTrainedTokenizerFast, longest: int = 512) -> LlamaConfig:
    """Of its four layers two count."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=longest,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def _make_llava(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=VISION_PATCHES * VISION_PATCH_SIZE,
        patch_size=VISION_PATCH_SIZE,
        initializer_factor=10.0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_llama_config(tokenizer, longest=1024),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
    )
    return _initialized(LlavaForConditionalGeneration(config))


def _initialized(model: Any) -> Any:
    """Freshly made, it hardly tells words and pictures apart."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.0 / parameter.shape[1] ** 0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model


def _make_transformer(
    *, guidance_embeds: bool, condition: ImageCondition | None = None
) -> HunyuanVideoTransformer3DModel:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1 if condition == "latent_concat" else LATENT_CHANNELS,
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
        image_condition_type=condition,
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
