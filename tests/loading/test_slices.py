"""Loading the part of a component that a rank of the tensor axis has."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from triton_diffusion.distributed.language_model import language_model_plan
from triton_diffusion.distributed.mesh import Axis
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.loading.slices import load_slices

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A language model with its head, which is no part of the embedding."""
    config = Qwen3Config(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def load_on_each_rank(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Of two ranks; to load needs no communication."""
    modules = [
        load_slices(
            Qwen3Model,
            folder,
            dtype=torch.float32,
            device=torch.device("cpu"),
            plan=language_model_plan(),
            tp=Axis(2, rank),
        )
        for rank in range(2)
    ]
    return [module.state_dict() for module in modules]


def test_a_model_is_read_from_the_files_of_one_with_a_head(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As from_pretrained reads it: the names in the files have a prefix then, and the weights of the head are left."""
    with caplog.at_level(logging.WARNING, "triton_diffusion"):
        first, second = load_on_each_rank(folder)
    stored = load_file(folder / WEIGHTS)
    columns = torch.cat([first["embed_tokens.weight"], second["embed_tokens.weight"]], dim=1)
    assert torch.equal(columns, stored["model.embed_tokens.weight"])
    rows = torch.cat([rank["layers.0.mlp.up_proj.weight"] for rank in (first, second)])
    assert torch.equal(rows, stored["model.layers.0.mlp.up_proj.weight"])
    assert "weights that Qwen3Model does not use: lm_head.weight" in caplog.text


def test_a_weight_that_is_missing_is_named(folder: Path) -> None:
    stored = load_file(folder / WEIGHTS)
    del stored["model.norm.weight"]
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"do not fit Qwen3Model: norm\.weight are missing; copy the whole"):
        load_on_each_rank(folder)
