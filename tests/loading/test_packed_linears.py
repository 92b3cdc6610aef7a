"""Linear layers in the layout of oneDNN: which are replaced, and how far what they give is from torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch.nn.functional import gelu

from checkpoints.families import CASES, SMALL, FamilyCase
from checkpoints.requests import make_request
from checkpoints.stages import InProcessStages, Picture, alone
from triton_diffusion.loading.checkpoint import DEMO_CHECKPOINT
from triton_diffusion.loading.packed_linears import PackedLinear, can_pack, pack_for_cpu
from triton_diffusion.runtime.stage_loading import load_stage

pytestmark = pytest.mark.skipif(not can_pack(), reason="this processor does not compute bfloat16 by oneDNN")

PICTURE = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
SHAPES = [(1, 1, 192), (6, 1, 192), (1, 96, 192), (8, 96, 192)]


@pytest.fixture
def linear() -> torch.nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Linear(192, 768).bfloat16().requires_grad_(False)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def assert_equal(ours: torch.Tensor, torchs: torch.Tensor) -> None:
    """To the bit on processors with AVX512-BF16; kernels of others may add up in another order: one rounding."""
    torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_layer_gives_the_same(linear: torch.nn.Linear, shape: tuple[int, ...]) -> None:
    inputs = normal(*shape)
    assert_equal(PackedLinear(linear)(inputs), linear(inputs))


def test_a_layer_without_bias_gives_the_same(linear: torch.nn.Linear) -> None:
    linear.bias = None
    inputs = normal(2, 96, 192)
    assert_equal(PackedLinear(linear)(inputs), linear(inputs))


def test_inputs_that_are_not_contiguous_give_what_contiguous_ones_do(linear: torch.nn.Linear) -> None:
    """torch itself adds the bias in a second operator for them."""
    inputs = normal(96, 2, 192).transpose(0, 1)
    assert_equal(PackedLinear(linear)(inputs), linear(inputs.contiguous()))


@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_in_the_layer_is_no_further_from_the_exact_value(linear: torch.nn.Linear, shape: tuple[int, ...]) -> None:
    inputs = normal(*shape)
    exact = gelu(copy.deepcopy(linear).double()(inputs.double()), approximate="tanh")
    ours = (PackedLinear(linear, gelu=True)(inputs).double() - exact).abs().mean()
    torchs = (gelu(linear(inputs), approximate="tanh").double() - exact).abs().mean()
    print(f"mean error {ours:.2e}, in two operators {torchs:.2e}")
    assert 0 < ours <= torchs


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    """Of the demo checkpoint."""
    return FluxTransformer2DModel.from_pretrained(DEMO_CHECKPOINT / "transformer", dtype=torch.bfloat16).eval()


def predicted(transformer: FluxTransformer2DModel) -> torch.Tensor:
    with torch.inference_mode():
        prediction: torch.Tensor = transformer(
            hidden_states=normal(2, 64, 64).to(transformer.dtype),
            encoder_hidden_states=normal(2, 32, 128).to(transformer.dtype),
            pooled_projections=normal(2, 128).to(transformer.dtype),
            timestep=torch.tensor([0.9, 0.4]).to(transformer.dtype),
            img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0)),
            txt_ids=torch.zeros(32, 3),
            return_dict=False,
        )[0]
    return prediction.float()


def test_a_packed_transformer_is_no_further_from_float32(transformer: FluxTransformer2DModel) -> None:
    exact = predicted(copy.deepcopy(transformer).float())
    rounded = (predicted(transformer) - exact).abs().mean()
    pack_for_cpu(transformer)
    packed = (predicted(transformer) - exact).abs().mean()
    print(f"mean error {packed:.2e}, with torch's layers {rounded:.2e}, of values of {exact.abs().mean():.2e}")
    assert 0 < packed <= 1.1 * rounded


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_family_is_as_far_from_float32_as_without(case: FamilyCase, tmp_path: Path) -> None:
    folder = case.build(tmp_path / "checkpoint")
    request = make_request(**SMALL | case.options | {"num_images": case.num_images})
    images: list[Picture] = [PICTURE] * case.num_images
    exact = InProcessStages(folder).latents(request, images=images).float()
    errors = {}
    for pack_linears in (True, False):
        stages = InProcessStages(folder, torch.bfloat16, pack_linears=pack_linears)
        errors[pack_linears] = (stages.latents(request, images=images).float() - exact).abs().mean().item()
    print(f"mean error {errors[True]:.4f}, with torch's layers {errors[False]:.4f}")
    assert errors[True] <= 1.5 * errors[False]


def test_every_linear_layer_of_a_transformer_is_packed(transformer: FluxTransformer2DModel) -> None:
    num_layers = sum(type(module) is torch.nn.Linear for module in transformer.modules())
    pack_for_cpu(transformer)
    kinds = [type(module) for module in transformer.modules()]
    assert (kinds.count(PackedLinear), kinds.count(torch.nn.Linear)) == (num_layers, 0)
    # One GELU a block, in the feed-forward of pictures and text, and beside the projection of single blocks.
    assert GELU not in kinds
    assert torch.nn.GELU not in kinds
    assert (transformer.dtype, transformer.device.type) == (torch.bfloat16, "cpu")


def test_a_stage_keeps_the_layers_of_diffusers_if_it_is_told_to() -> None:
    kinds = {}
    for pack_linears in (True, False):
        stage = load_stage("denoising", "demo", alone(), dtype=torch.bfloat16, pack_linears=pack_linears)
        kinds[pack_linears] = {type(module) for module in stage.components["transformer"].modules()}
    assert PackedLinear in kinds[True]
    assert PackedLinear not in kinds[False]


def add_hook(model: FeedForward) -> None:
    model.net[0].proj.register_forward_hook(lambda *_: None)


def stay_float32(model: FeedForward) -> None:
    model.net[0].proj.float()


@pytest.mark.parametrize("change", [add_hook, stay_float32])
def test_a_layer_that_cannot_be_replaced_stays(change: Callable[[FeedForward], None]) -> None:
    model = FeedForward(192, activation_fn="gelu-approximate").bfloat16()
    change(model)
    pack_for_cpu(model)
    assert type(model.net[0]) is GELU
    assert type(model.net[0].proj) is torch.nn.Linear
    assert type(model.net[2]) is PackedLinear


def test_another_activation_stays_beside_its_packed_layer() -> None:
    model = FeedForward(192, activation_fn="gelu").bfloat16().requires_grad_(False)
    inputs = normal(2, 96, 192)
    before = model(inputs)
    pack_for_cpu(model)
    assert type(model.net[0]) is GELU
    assert type(model.net[0].proj) is PackedLinear
    assert_equal(model(inputs), before)
