"""The attention backends that run everywhere, how one is chosen, and how diffusers' models come to use it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from triton_diffusion.attention import backends
from triton_diffusion.attention.backends import BACKENDS, AttentionBackend, AttentionInputs, key_mask
from triton_diffusion.attention.choice import ENVIRONMENT_VARIABLE, choose_backend
from triton_diffusion.attention.diffusers_models import replace_attention
from triton_diffusion.distributed.attention import ParallelAttention, merge
from triton_diffusion.distributed.mesh import Mesh
from triton_diffusion.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EVERYWHERE = ["torch_sdpa", "flex"]
BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 5, 12, 3, 16

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, length, HEADS, WIDTH) for length in (QUERIES, KEYS, KEYS)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def padding(lengths: Sequence[int]) -> torch.Tensor:
    """Which keys of each row count (B, Sk)."""
    return torch.arange(KEYS)[None] < torch.tensor(lengths)[:, None]


def reference(
    tensors: Tensors, keep: torch.Tensor | None, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in float64, written out."""
    query, key, value = (tensor.double() for tensor in tensors)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * (WIDTH**-0.5 if scale is None else scale)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    return torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value), scores.logsumexp(-1)


# The backends.


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("lengths", [None, [KEYS, 3], [1, 7]], ids=["no mask", "one row padded", "both rows padded"])
def test_a_backend_gives_output_and_log_sum_exp(
    tensors: Tensors, name: str, with_lse: bool, lengths: list[int] | None
) -> None:
    keep = None if lengths is None else padding(lengths)
    out, lse = BACKENDS[name].attend(
        AttentionInputs(*tensors, key_mask(keep, KEYS, torch.float32), None), with_lse=with_lse
    )
    expected_out, expected_lse = reference(tensors, keep)
    assert torch.allclose(out.double(), expected_out, atol=1e-5)
    assert (lse is not None) == with_lse
    if lse is not None:
        assert lse.dtype == torch.float32
        assert torch.allclose(lse.double(), expected_lse, atol=1e-5)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_backend_takes_a_scale_of_the_models_own(tensors: Tensors, name: str) -> None:
    out, lse = BACKENDS[name].attend(AttentionInputs(*tensors, None, 0.7), with_lse=True)
    expected_out, expected_lse = reference(tensors, None, 0.7)
    assert torch.allclose(out.double(), expected_out, atol=1e-5)
    assert lse is not None
    assert torch.allclose(lse.double(), expected_lse, atol=1e-5)


# Masks.


@pytest.mark.parametrize("ndim", [2, 4])
def test_boolean_and_additive_masks_of_both_shapes_come_out_alike(ndim: int) -> None:
    keep = padding([4, 9])
    additive = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    masks = [mask if ndim == 2 else mask[:, None, None] for mask in (keep, additive)]
    boolean, added = (key_mask(mask, KEYS, torch.bfloat16) for mask in masks)
    assert boolean is not None
    assert added is not None
    assert boolean.shape == (BATCH, 1, 1, KEYS)
    assert boolean.dtype == torch.bfloat16
    assert torch.equal(boolean, added)
    assert boolean.isfinite().all()


@pytest.mark.parametrize("shape", [(2, KEYS + 1), (2, 1, QUERIES, KEYS), (2, HEADS, 1, KEYS)])
def test_a_mask_that_is_not_over_the_keys_alone_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"is not one over {KEYS} keys"):
        key_mask(torch.ones(shape, dtype=torch.bool), KEYS, torch.float32)


# Attention over parts of the keys.


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("lengths", [None, [KEYS, 3], [1, 2]], ids=["no mask", "one row ends early", "both rows do"])
def test_parts_of_the_keys_merge_to_all_of_them(tensors: Tensors, name: str, lengths: list[int] | None) -> None:
    """With prompts that end early, the later parts are masked entirely."""
    query, key, value = tensors
    keep = None if lengths is None else padding(lengths)
    mask = key_mask(keep, KEYS, torch.float32)
    merged = None
    for start, stop in ((0, 4), (4, 5), (5, KEYS)):
        bias = None if mask is None else mask[..., start:stop].contiguous()
        part = BACKENDS[name].attend(
            AttentionInputs(query, key[:, start:stop], value[:, start:stop], bias, None), with_lse=True
        )
        merged = merge(merged, part)
    assert merged is not None
    expected_out, expected_lse = reference(tensors, keep)
    assert torch.allclose(merged[0].double(), expected_out, atol=1e-5)
    assert torch.allclose(merged[1].double(), expected_lse, atol=1e-5)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_first_part_that_is_masked_entirely_has_no_share(tensors: Tensors, name: str) -> None:
    query, key, value = tensors
    keep = ~padding([4, 4])
    mask = key_mask(keep, KEYS, torch.float32)
    assert mask is not None
    merged = None
    for start, stop in ((0, 4), (4, KEYS)):
        bias = mask[..., start:stop].contiguous()
        part = BACKENDS[name].attend(
            AttentionInputs(query, key[:, start:stop], value[:, start:stop], bias, None), with_lse=True
        )
        merged = merge(merged, part)
    assert merged is not None
    assert torch.allclose(merged[0].double(), reference(tensors, keep)[0], atol=1e-5)


def test_parts_in_half_precision_are_merged_in_float32(tensors: Tensors) -> None:
    part = BACKENDS["torch_sdpa"].attend(
        AttentionInputs(*(tensor.bfloat16() for tensor in tensors), None, None), with_lse=True
    )
    out, lse = merge(merge(None, part), part)
    assert out.dtype == lse.dtype == torch.float32


def test_a_backend_that_takes_no_mask_leaves_masked_calls_to_torch(tensors: Tensors) -> None:
    keep = padding([3, 9])
    attention = ParallelAttention(BACKENDS["flash_attn"], Mesh(), None)
    assert torch.allclose(attention(*tensors, keep).double(), reference(tensors, keep)[0], atol=1e-5)


# Libraries for GPUs, by stand-ins that take the arguments of the real ones, and return what those do.


def flash_attn_2(*tensors: Any, softmax_scale: float | None = None, return_attn_probs: bool = False) -> Any:
    out, lse = attended_heads_second(*tensors, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_3(*tensors: Any, softmax_scale: float | None = None, return_attn_probs: bool = False) -> Any:
    out, lse = attended_heads_second(*tensors, softmax_scale)
    return (out, lse) if return_attn_probs else out


def flash_attn_3_of_2024(*tensors: Any, softmax_scale: float | None = None) -> Any:
    return attended_heads_second(*tensors, softmax_scale)


def flash_attn_4(*tensors: Any, softmax_scale: float | None = None, return_lse: bool = False) -> Any:
    out, lse = attended_heads_second(*tensors, softmax_scale)
    return out, lse if return_lse else None


def sage_attn_2(*tensors: Any, tensor_layout: str, sm_scale: float | None = None, return_lse: bool = False) -> Any:
    assert tensor_layout == "NHD"
    out, lse = attended_heads_second(*tensors, sm_scale)
    return (out, lse) if return_lse else out


def sage_attn_1(*tensors: Any, tensor_layout: str, sm_scale: float | None = None, **_: Any) -> Any:
    assert tensor_layout == "NHD"
    return attended_heads_second(*tensors, sm_scale)[0]


def attended_heads_second(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, Sq, H, D) and log-sum-exp (B, H, Sq)."""
    out, lse = BACKENDS["torch_sdpa"].attend(AttentionInputs(query, key, value, None, scale), with_lse=True)
    assert lse is not None
    return out, lse.transpose(1, 2)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], AttentionBackend]:
    """Puts a stand-in where the library would be."""

    def install(function: Any) -> AttentionBackend:
        if function.__name__.startswith("sage"):
            monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=function))
            return BACKENDS["sage_attn"]
        version = int(function.__name__.split("_")[2])
        monkeypatch.setattr(backends, "flash_attn_version", lambda _: version)
        module = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}[version]
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=function))
        return BACKENDS["flash_attn"]

    return install


LIBRARIES = [flash_attn_2, flash_attn_3, flash_attn_3_of_2024, flash_attn_4, sage_attn_2]


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("function", LIBRARIES, ids=lambda function: function.__name__)
def test_libraries_are_asked_for_the_log_sum_exp_as_each_wants_it(
    function: Any, scale: float | None, install: Callable[[Any], AttentionBackend], tensors: Tensors
) -> None:
    backend, inputs = install(function), AttentionInputs(*tensors, None, scale)
    expected_out, expected_lse = BACKENDS["torch_sdpa"].attend(inputs, with_lse=True)
    out, lse = backend.attend(inputs, with_lse=True)
    assert expected_lse is not None
    assert lse is not None
    assert torch.allclose(out, expected_out)
    assert torch.allclose(lse, expected_lse)
    alone, none = backend.attend(inputs, with_lse=False)
    assert torch.allclose(alone, expected_out)
    assert none is None


def test_a_version_without_log_sum_exp_attends_but_says_so_in_a_ring(
    install: Callable[[Any], AttentionBackend], tensors: Tensors
) -> None:
    """The first SageAttention takes any argument, and returns no tuple: its first row was taken for all."""
    backend, inputs = install(sage_attn_1), AttentionInputs(*tensors)
    assert backend.attend(inputs, with_lse=False)[0].shape == tensors[0].shape
    with pytest.raises(RuntimeError, match="this version of sageattention gives no log-sum-exp"):
        backend.attend(inputs, with_lse=True)


@pytest.mark.parametrize(
    ("name", "capability", "head_dim", "message"),
    [
        ("sage_attn", (10, 0), 128, "sage_attn has no kernel for GPUs of compute capability 10.0"),
        ("flash_attn", (10, 0), 192, "flash_attn 4 takes heads of at most 128, or of 256, and the model's have 192"),
        ("flash_attn", (7, 5), 64, "flash_attn is installed in no version for this GPU"),
    ],
)
def test_what_a_library_cannot_do_on_a_gpu_is_refused_at_the_start(
    name: str, capability: tuple[int, int], head_dim: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ConfigurationError, match=message):
        choose_backend(name, device=CUDA, dtype=torch.bfloat16, head_dim=head_dim)


# The choice.


def test_auto_on_the_cpu_is_torch_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    backend, reason = choose_backend("auto", device=CPU, dtype=torch.float32, head_dim=64)
    assert (backend.name, reason) == ("torch_sdpa", "the device is cpu")


def test_the_environment_variable_decides_where_the_configuration_says_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DIFFUSION_ATTENTION_BACKEND", "flex")
    backend, reason = choose_backend("auto", device=CPU, dtype=torch.float32, head_dim=64)
    assert (backend.name, reason) == ("flex", "TRITON_DIFFUSION_ATTENTION_BACKEND=flex")


def test_the_configuration_goes_before_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flex")
    backend, reason = choose_backend("torch_sdpa", device=CPU, dtype=torch.float32, head_dim=64)
    assert (backend.name, reason) == ("torch_sdpa", "attention_backend=torch_sdpa")


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigurationError, match=r"attention_backend=flash_atn is not known.*did you mean flash_attn"):
        choose_backend("flash_atn", device=CPU, dtype=torch.float32, head_dim=64)


def test_an_unknown_name_in_the_environment_is_refused_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "sdpa")
    with pytest.raises(ConfigurationError, match=f"{ENVIRONMENT_VARIABLE}=sdpa is not known"):
        choose_backend("auto", device=CPU, dtype=torch.float32, head_dim=64)


@pytest.mark.parametrize(("name", "package"), [("flash_attn", "flash-attn"), ("sage_attn", "sageattention")])
def test_a_backend_that_is_not_installed_is_refused_with_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda module: False)
    with pytest.raises(ConfigurationError, match=f"attention_backend={name} is not installed: `pip install {package}"):
        choose_backend(name, device=CUDA, dtype=torch.bfloat16, head_dim=64)


def test_a_backend_of_half_precision_is_refused_in_float32() -> None:
    with pytest.raises(ConfigurationError, match=r"cudnn computes in bfloat16 and float16, .* is in float32"):
        choose_backend("cudnn", device=CUDA, dtype=torch.float32, head_dim=64)


def test_a_backend_for_gpus_is_refused_on_the_cpu() -> None:
    with pytest.raises(ConfigurationError, match=r"cudnn needs a GPU, and the device is cpu; use torch_sdpa"):
        choose_backend("cudnn", device=CPU, dtype=torch.bfloat16, head_dim=64)


@pytest.mark.parametrize("head_dim", [100, 264])
def test_heads_that_a_backend_cannot_take_are_refused(head_dim: int) -> None:
    with pytest.raises(ConfigurationError, match=f"at most 256 in multiples of 8, and the model's have {head_dim}"):
        choose_backend("cudnn", device=CUDA, dtype=torch.bfloat16, head_dim=head_dim)


# Models of diffusers.


class Zeros:
    """An attention whose results are easily told from any other's."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        self.num_calls += 1
        return torch.zeros_like(query)


def make_flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def run_flux(model: FluxTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        output: torch.Tensor = model(
            hidden_states=torch.randn(1, 6, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 8, generator=generator),
            pooled_projections=torch.randn(1, 8, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
            return_dict=False,
        )[0]
    return output


def test_every_attention_of_a_model_gets_a_function_of_its_own() -> None:
    model, made = make_flux(), []

    def make() -> Zeros:
        made.append(Zeros())
        return made[-1]

    assert replace_attention(model, make) == 3
    run_flux(model)
    assert [each.num_calls for each in made] == [1, 1, 1]


def test_other_models_of_the_process_are_left_alone() -> None:
    ours, other = make_flux(), make_flux()
    before = run_flux(other)
    replace_attention(ours, Zeros)
    assert not torch.equal(run_flux(ours), before)
    assert torch.equal(run_flux(other), before)
    assert torch.equal(run_flux(make_flux()), before), "nor those that are made later"


def test_our_attention_alone_changes_nothing_in_a_model() -> None:
    model = make_flux()
    before = run_flux(model)
    replace_attention(model, lambda: ParallelAttention(BACKENDS["torch_sdpa"], Mesh(), None))
    assert torch.allclose(run_flux(model), before, atol=1e-6)


def test_modules_that_are_to_be_left_keep_their_attention() -> None:
    model = make_flux()
    attention = Zeros()
    assert replace_attention(model, lambda: attention, leave=["transformer_blocks", "single_transformer_blocks.0"]) == 1
    run_flux(model)
    assert attention.num_calls == 1


def test_a_model_whose_attention_does_not_go_through_the_dispatcher_is_refused() -> None:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    with pytest.raises(
        ConfigurationError, match=r"SD3Transformer2DModel: transformer_blocks\.0.*JointAttnProcessor2_0"
    ):
        replace_attention(model, Zeros)


def test_a_model_that_is_refused_is_not_changed_in_part() -> None:
    model = make_flux()
    processors = list(model.attn_processors.values())
    model.single_transformer_blocks[1].attn.processor = object()
    with pytest.raises(ConfigurationError, match=r"single_transformer_blocks\.1"):
        replace_attention(model, Zeros)
    assert all(processor._attention_backend is None for processor in processors)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Linear has no attention processors"):
        replace_attention(torch.nn.Linear(1, 1), Zeros)
