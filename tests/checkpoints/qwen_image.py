"""Qwen-Image checkpoints in diffusers layout from the real classes: random weights in float32, 1 MB on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.processing_utils import ProcessorMixin

from checkpoints.text import WIDTH, train_byte_bpe

PIPELINES: dict[str, Any] = {
    "QwenImagePipeline": QwenImagePipeline,
    "QwenImageEditPipeline": QwenImageEditPipeline,
    "QwenImageEditPlusPipeline": QwenImageEditPlusPipeline,
}
LATENT_CHANNELS = 4
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Pixels along a side of what the language model sees as one token of a picture.
VISION_PATCH, VISION_MERGE = 14, 2


def build_qwen_image_checkpoint(
    folder: Path,
    pipeline_class: str = "QwenImagePipeline",
    *,
    halvings: int = 1,
    zero_cond_t: bool = False,
    num_heads: int = 2,
    seed: int = 0,
) -> Path:
    """Write a checkpoint into `folder`; equal arguments make equal weights.

    halvings: how often the autoencoder halves a picture. zero_cond_t: as Qwen-Image-Edit-2511 has it.
    """
    edits = pipeline_class != "QwenImagePipeline"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = train_qwen_tokenizer()
        components: dict[str, Any] = {
            "scheduler": FlowMatchEulerDiscreteScheduler(
                base_shift=0.5,
                max_shift=0.9,
                max_image_seq_len=8192,
                shift_terminal=0.02,
                use_dynamic_shifting=True,
            ),
            "vae": _make_vae(halvings),
            "text_encoder": make_qwen_vl(tokenizer),
            "tokenizer": tokenizer,
            "transformer": make_qwen_transformer(zero_cond_t=zero_cond_t, num_heads=num_heads),
        }
        if edits:
            components["processor"] = None
        pipeline = PIPELINES[pipeline_class](**components)
    pipeline.save_pretrained(folder)
    if edits:
        _save_processor(folder, tokenizer)
    return folder


def train_qwen_tokenizer() -> Qwen2Tokenizer:
    """As Qwen2.5's: each word of the templates is one token, so that they are as long as with the real vocabulary."""
    bpe = train_byte_bpe(
        SPECIAL_TOKENS,
        sentences=[prompt_template(name) for name in PIPELINES],
        vocab_size=1500,
        pre_tokenizer=Qwen2Tokenizer().backend_tokenizer.pre_tokenizer,
    )
    merges: Any = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # Padded on the left, as for models that go on writing: an encoder must not leave the side to the tokenizer.
    return Qwen2Tokenizer(
        vocab=bpe.get_vocab(), merges=merges, extra_special_tokens=list(SPECIAL_TOKENS[1:]), padding_side="left"
    )


def prompt_template(pipeline_class: str) -> str:
    """What the pipeline puts around a prompt, with the special tokens left out."""
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    others = () if pipeline_class == "QwenImagePipeline" else ("processor",)
    template: str = _without_parts(pipeline_class, (*names, *others)).prompt_template_encode
    for token in SPECIAL_TOKENS:
        template = template.replace(token, "")
    return template


def make_qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of two layers each for text and pictures."""
    ids: dict[str, Any] = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "endoftext")
    }
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
                "pad_token_id": ids["endoftext"],
                "bos_token_id": ids["endoftext"],
                "eos_token_id": ids["endoftext"],
            },
            vision_config={
                "depth": 2,
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_heads": 2,
                "patch_size": VISION_PATCH,
                "spatial_merge_size": VISION_MERGE,
                "window_size": 2 * VISION_PATCH * VISION_MERGE,
                "fullatt_block_indexes": [1],
                "out_hidden_size": WIDTH,
            },
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            tie_word_embeddings=True,
        )
    )
    _listen(model)
    return model


def make_qwen_transformer(*, zero_cond_t: bool, num_heads: int) -> QwenImageTransformer2DModel:
    """A transformer of two blocks."""
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=num_heads,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    _listen(transformer)
    return transformer


def _listen(model: Any) -> None:
    """Freshly made, a model hardly listens to what it is given; a change must show in the result."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def _make_vae(halvings: int) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8 if halvings == 1 else 4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1] * (halvings + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * halvings,
        latents_mean=[-0.7, 0.2, 0.1, -0.4],
        latents_std=[0.8, 1.4, 1.1, 0.6],
    )


def _without_parts(pipeline_class: str, names: Sequence[str]) -> Any:
    """A pipeline that has nothing but what its class says."""
    return PIPELINES[pipeline_class](**dict.fromkeys(names))


class PictureProcessor(Qwen2VLProcessor):
    """Qwen2VLProcessor without its part for videos, which needs torchvision and is not called by the pipelines."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])


class EditPipelines:
    """Loads a pipeline that edits, with a PictureProcessor."""

    def __init__(self, pipeline_class: str) -> None:
        self._pipeline_class = PIPELINES[pipeline_class]

    def from_pretrained(self, folder: Path, **arguments: Any) -> Any:
        """The pipeline of a checkpoint of ours."""
        processor = PictureProcessor(
            Qwen2VLImageProcessor.from_pretrained(folder / "processor"),
            Qwen2Tokenizer.from_pretrained(folder / "processor"),
        )
        return self._pipeline_class.from_pretrained(folder, processor=processor, **arguments)


def _save_processor(folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """As published: the files of its parts, side by side."""
    token = VISION_PATCH * VISION_MERGE
    Qwen2VLImageProcessor(min_pixels=4 * token**2, max_pixels=16 * token**2).save_pretrained(folder / "processor")
    tokenizer.save_pretrained(folder / "processor")
    index = folder / "model_index.json"
    content = json.loads(index.read_text()) | {"processor": ["transformers", "Qwen2VLProcessor"]}
    index.write_text(json.dumps(content, indent=2))
