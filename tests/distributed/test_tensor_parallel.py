"""Tensor parallelism: which slices of the weights a rank reads, and T5 over two ranks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.hooks.tensor_parallel import TPShardSpec
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from distributed.ranks import run_ranks
from distributed.scenarios import encode_with_t5
from triton_diffusion.config import ParallelConfig
from triton_diffusion.distributed.mesh import Axis
from triton_diffusion.distributed.tensor_parallel import TensorPlan, local_slice, shard_specs
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.base import check_degree
from triton_diffusion.families.flux import FAMILY
from triton_diffusion.families.registry import FAMILIES
from triton_diffusion.loading.checkpoint import Checkpoint, open_checkpoint
from triton_diffusion.loading.components import load_components

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchmarks.layouts.checkpoint import build_checkpoint

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """FLUX in its proportions: one double block for two single ones, and far wider than the text is."""
    folder = tmp_path_factory.mktemp("tensor-parallel") / "flux"
    build_checkpoint(folder, num_heads=8, head_dim=64, num_layers=2, num_single_layers=4)
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> Weights:
    return load_transformer(checkpoint, Axis())


@pytest.fixture(scope="module")
def parts(checkpoint: Checkpoint) -> list[Weights]:
    """Of each of two ranks; to load needs no communication."""
    return [load_transformer(checkpoint, Axis(2, rank)) for rank in range(2)]


def load_transformer(checkpoint: Checkpoint, tp: Axis) -> Weights:
    components = load_components(
        checkpoint,
        ("transformer",),
        dtype=torch.float32,
        device=torch.device("cpu"),
        tensor_plans=FAMILY.parallelize.tensor_plans(checkpoint),
        tp=tp,
    )
    weights: Weights = components["transformer"].state_dict()
    return weights


# The weights of a rank.


def test_each_of_two_ranks_has_little_more_than_half_of_the_weights(whole: Weights, parts: list[Weights]) -> None:
    size = sum(weight.numel() for weight in whole.values())
    for part in parts:
        assert 0.5 <= sum(weight.numel() for weight in part.values()) / size <= 0.55


def test_the_slices_of_all_ranks_are_the_whole_weights(whole: Weights, parts: list[Weights], checkpoint: Any) -> None:
    specs = make_specs(checkpoint, 2)
    assert [part.keys() for part in parts] == [whole.keys()] * 2
    for name, weight in whole.items():
        first, second = (part[name] for part in parts)
        spec = specs.get(name)
        if spec is None:
            assert torch.equal(first, weight), name
            assert torch.equal(second, weight), name
        elif spec.dim is None:
            assert torch.equal(first, weight), name
            assert not second.any(), "a bias that both add would count twice"
        else:
            halves = [size // 2 for size in spec.block_sizes]
            blocks = zip(first.split(halves, spec.dim), second.split(halves, spec.dim), strict=True)
            assert torch.equal(torch.cat([half for block in blocks for half in block], spec.dim), weight), name


def test_the_layers_with_most_of_the_weights_are_all_divided(whole: Weights, checkpoint: Checkpoint) -> None:
    specs = make_specs(checkpoint, 2)
    whole_matrices = {name: weight.numel() for name, weight in whole.items() if name not in specs and weight.ndim == 2}
    assert sum(whole_matrices.values()) < 0.05 * sum(weight.numel() for weight in whole.values()), whole_matrices


def make_specs(checkpoint: Checkpoint, tp_size: int) -> dict[str, TPShardSpec]:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(checkpoint.config("transformer"))
    return shard_specs(model, FAMILY.parallelize.tensor_plans(checkpoint)["transformer"], tp_size)


class CountingSlice:
    """A safetensors slice that takes note of how much is read."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.num_read = 0

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self._inner[index]
        self.num_read += part.numel()
        return part


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    "spec",
    [TPShardSpec(0, [12]), TPShardSpec(1, [18]), TPShardSpec(0, [3, 9]), TPShardSpec(1, [6, 3, 9])],
    ids=["outputs", "inputs", "packed outputs", "packed inputs"],
)
def test_a_slice_is_that_of_the_whole_and_nothing_else_is_read(tmp_path: Path, spec: TPShardSpec, rank: int) -> None:
    weight = torch.arange(12.0 * 18).view(12, 18)
    save_file({"weight": weight}, tmp_path / "weights.safetensors")
    assert spec.dim is not None
    expected = torch.cat(
        [block.chunk(3, spec.dim)[rank] for block in weight.split(spec.block_sizes, spec.dim)], spec.dim
    )
    with safe_open(tmp_path / "weights.safetensors", "pt") as tensors:
        counted = CountingSlice(tensors.get_slice("weight"))
        assert torch.equal(local_slice(counted, spec, Axis(3, rank)), expected)
    assert counted.num_read == weight.numel() // 3
    assert torch.equal(local_slice(weight, spec, Axis(3, rank)), expected), "of a tensor as well"


def test_a_bias_behind_a_sum_is_kept_by_the_first_rank_alone() -> None:
    bias, spec = torch.ones(5), TPShardSpec(None, None)
    assert torch.equal(local_slice(bias, spec, Axis(2, 0)), bias)
    assert torch.equal(local_slice(bias, spec, Axis(2, 1)), torch.zeros(5))


# T5.


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
def test_t5_over_two_ranks_encodes_as_on_one(flux_checkpoint: Path, tmp_path: Path, feed_forward: str) -> None:
    folder = str(copy_with_t5(flux_checkpoint, tmp_path / "checkpoint", feed_forward))
    (one,) = run_ranks(encode_with_t5, ParallelConfig(), folder=folder)
    both = run_ranks(encode_with_t5, ParallelConfig(tp=2), folder=folder)
    for rank in both:
        assert np.abs(rank["states"] - one["states"]).max() < 1e-5
        assert rank["num_weights"] < one["num_weights"]
        assert rank["sent_bytes"] > 0
    assert one["states"].std() > 0.1, "there is something to get wrong"


def copy_with_t5(source: Path, folder: Path, feed_forward: str) -> Path:
    """A FLUX checkpoint with a T5 of another feed-forward."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("text_encoder_2", "transformer"))
    shape = T5Config.from_pretrained(source / "text_encoder_2")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=shape.vocab_size,
                d_model=shape.d_model,
                d_kv=shape.d_kv,
                d_ff=shape.d_ff,
                num_layers=shape.num_layers,
                num_heads=4,
                feed_forward_proj=feed_forward,
                dropout_rate=0.0,
            )
        )
        for parameter in encoder.parameters():
            # Freshly made, its position bias is close to nothing.
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=1 / parameter.shape[1] ** 0.5)
    encoder.save_pretrained(folder / "text_encoder_2")
    return folder


# The language models.


@pytest.mark.parametrize(
    ("family", "model_class", "config"),
    [
        ("hunyuan_video", LlamaModel, LlamaConfig(hidden_size=4096, intermediate_size=14336, vocab_size=128320)),
        (
            "hunyuan_video",
            LlavaForConditionalGeneration,
            LlavaConfig(text_config=LlamaConfig(hidden_size=4096, intermediate_size=14336, vocab_size=128320)),
        ),
        ("z_image", Qwen3Model, Qwen3Config(hidden_size=2560, intermediate_size=9728, vocab_size=151936)),
        (
            "qwen_image",
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig(
                text_config={
                    "hidden_size": 3584,
                    "intermediate_size": 18944,
                    "num_attention_heads": 28,
                    "num_key_value_heads": 4,
                    "num_hidden_layers": 28,
                    "vocab_size": 152064,
                },
                vision_config={"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
                tie_word_embeddings=False,
            ),
        ),
        (
            "flux2",
            Mistral3ForConditionalGeneration,
            Mistral3Config(
                text_config=MistralConfig(
                    hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, head_dim=128, vocab_size=131072
                ),
                tie_word_embeddings=False,
            ),
        ),
    ],
)
def test_each_of_two_ranks_has_about_half_of_a_language_model(family: str, model_class: Any, config: Any) -> None:
    """In the sizes that are published; nothing is allocated."""
    with init_empty_weights():
        model = model_class(config)
    specs = shard_specs(model, language_model_plan_of(family, model_class), 2)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    half = sum(size / (2 if name in specs and specs[name].dim is not None else 1) for name, size in sizes.items())
    share = half / sum(sizes.values())
    print(f"{share:.3f} of {sum(sizes.values()) / 1e9:.1f} billion weights a rank")
    assert share < 0.52


def language_model_plan_of(family: str, model_class: Any) -> TensorPlan:
    """Of a checkpoint of which only the configuration of the transformer is asked."""
    config = {"num_attention_heads": 4, "attention_head_dim": 8, "image_condition_type": "token_replace"}
    sees = model_class is LlavaForConditionalGeneration
    pipeline_class = "HunyuanVideoImageToVideoPipeline" if sees else "Flux2Pipeline"
    checkpoint: Any = SimpleNamespace(config=lambda _: config, pipeline_class=pipeline_class)
    (found,) = (each for each in FAMILIES if each.name == family)
    plan: TensorPlan = found.parallelize.tensor_plans(checkpoint)["text_encoder"]
    return plan


# Degrees.


def test_a_degree_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_degree("ulysses_degree", 5, {"num_attention_heads": 24})
    assert str(caught.value) == (
        "ulysses_degree=5 does not divide num_attention_heads=24; use 1, 2, 3, 4, 6, 8, 12, 24"
    )


def test_a_degree_must_divide_every_number() -> None:
    check_degree("tp_size", 4, {"num_heads": 64, "d_ff": 12})
    with pytest.raises(ConfigurationError, match=r"tp_size=8 does not divide d_ff=12; use 1, 2, 4$"):
        check_degree("tp_size", 8, {"num_heads": 64, "d_ff": 12})


@pytest.mark.parametrize(
    ("stage_model", "parallel", "message"),
    [
        ("denoising", ParallelConfig(tp=3), r"tp_size=3 does not divide num_attention_heads=8; use 1, 2, 4, 8$"),
        ("denoising", ParallelConfig(ulysses=3), r"ulysses_degree=3 .*=8; use 1, 2, 4, 8; or ring_degree"),
        ("denoising", ParallelConfig(tp=4, ulysses=4), r"num_attention_heads / tp_size=2; use 1, 2; or ring_degree"),
        ("text_encoding", ParallelConfig(tp=3), r"tp_size=3 does not divide num_heads=\d+ and d_ff=\d+; use 1, 2"),
    ],
)
def test_flux_is_refused_where_its_heads_do_not_divide(
    checkpoint: Checkpoint, stage_model: str, parallel: ParallelConfig, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FAMILY.check_parallel(stage_model, checkpoint, parallel)


@pytest.mark.parametrize(
    ("stage_model", "parallel"),
    [
        ("denoising", ParallelConfig(tp=2, ulysses=4)),
        ("denoising", ParallelConfig(ring=3)),
        ("text_encoding", ParallelConfig(tp=2)),
        ("decoding", ParallelConfig()),
    ],
)
def test_flux_is_taken_where_its_heads_divide(
    checkpoint: Checkpoint, stage_model: str, parallel: ParallelConfig
) -> None:
    FAMILY.check_parallel(stage_model, checkpoint, parallel)


def test_weights_that_do_not_divide_are_refused_by_name(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigurationError, match=r"tp_size=3 does not fit FluxTransformer2DModel: .*to_q"):
        make_specs(checkpoint, 3)
