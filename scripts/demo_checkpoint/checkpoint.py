"""Writing and reading the demo checkpoint: an ordinary diffusers folder for FluxPipeline."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline

from demo_checkpoint import text
from demo_checkpoint.transformer import TextToLatents, make_noise_scheduler


def save_checkpoint(folder: Path, *, vae: AutoencoderKL, model: TextToLatents, tokenizers: text.Tokenizers) -> int:
    """Write the checkpoint in bfloat16, in place of what `folder` held; return the bytes of its weights."""
    model, vae = copy.deepcopy(model).bfloat16(), copy.deepcopy(vae).bfloat16()
    pipeline = FluxPipeline(
        scheduler=make_noise_scheduler(),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizers.clip,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizers.t5,
        transformer=model.transformer,
    )
    if folder.exists():
        shutil.rmtree(folder)
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    # transformers 5 has one name for both of its T5 tokenizers; version 4 would take it for the slow one.
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def load_pipeline(folder: Path) -> FluxPipeline:
    """Load the checkpoint as anyone would, in float32 on the CPU."""
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
