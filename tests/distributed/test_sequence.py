"""The sequence cut and put together again: the hooks' arithmetic, diffusers' plans, and masks over several streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, WanTransformer3DModel

from distributed.ranks import run_ranks
from distributed.scenarios import draw_with_hunyuan
from triton_diffusion.config import ParallelConfig
from triton_diffusion.distributed.mesh import Axis, split_sizes
from triton_diffusion.distributed.sequence import (
    Gather,
    SequencePlan,
    Shard,
    ShardedSequence,
    plan_from_diffusers,
    shard_sequence,
)

# Cutting.


@pytest.mark.parametrize(
    ("total", "degree", "expected"), [(8, 2, [4, 4]), (7, 4, [2, 2, 2, 1]), (2, 4, [1, 1, 0, 0]), (0, 2, [0, 0])]
)
def test_a_length_is_shared_as_equally_as_can_be(total: int, degree: int, expected: list[int]) -> None:
    assert split_sizes(total, degree) == expected


@pytest.mark.parametrize(("length", "degree"), [(8, 2), (7, 3), (2, 4)])
def test_the_parts_of_all_ranks_are_the_whole_in_order(length: int, degree: int) -> None:
    whole = torch.arange(2.0 * length * 3).view(2, length, 3)
    parts = [ShardedSequence(Axis(degree, rank)).shard(whole, Shard(1, ("image",))) for rank in range(degree)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_a_tensor_of_several_streams_is_cut_stream_by_stream() -> None:
    mask = torch.tensor([[10, 11, 12, 13, 14, 20, 21, 22]])
    parts = []
    for rank in range(2):
        sequence = ShardedSequence(Axis(2, rank), {"image": 5, "text": 3})
        parts.append(sequence.shard(mask, Shard(-1, ("image", "text"))).tolist())
    assert parts == [[[10, 11, 12, 20, 21]], [[13, 14, 22]]]


def test_a_tensor_that_is_not_as_long_as_its_streams_is_refused() -> None:
    sequence = ShardedSequence(Axis(2, 0), {"image": 5, "text": 3})
    with pytest.raises(ValueError, match=r"\('image', 'text'\) are \[5, 3\] tokens, but dim 1 of \[1, 9\] is not"):
        sequence.shard(torch.zeros(1, 9), Shard(1, ("image", "text")))


def test_a_tensor_of_another_number_of_dimensions_is_left_whole() -> None:
    sequence = ShardedSequence(Axis(2, 1))
    how = Shard(1, ("timestep",), num_dims=2)
    assert sequence.shard(torch.zeros(3), how).shape == (3,)
    assert sequence.shard(torch.zeros(3, 8), how).shape == (3, 4)


def test_only_lengths_that_all_divide_are_even() -> None:
    assert ShardedSequence(Axis(2, 0), {"image": 4, "text": 2}).is_even
    assert not ShardedSequence(Axis(2, 0), {"image": 4, "text": 3}).is_even


class Adding(torch.nn.Module):
    """Two streams in, their sum over the tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, image: torch.Tensor, text: torch.Tensor | None = None) -> list[torch.Tensor]:
        return [block(image, text=text) for block in self.blocks]


class Block(torch.nn.Module):
    def forward(self, image: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        return image.sum(1) + (0 if text is None else text.sum(1))


def test_arguments_are_cut_by_name_whether_they_come_by_place_or_by_name() -> None:
    model = Adding()
    shard_sequence(model, SequencePlan({"": {"image": Shard(1, ("i",)), "text": Shard(1, ("t",))}}, {}), Axis(2, 1))
    image, text = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20]])
    for outputs in (model(image, text), model(image, text=text), model(text=text, image=image)):
        assert [output.item() for output in outputs] == [3 + 20] * 2
    assert [output.item() for output in model(image)] == [3, 3], "an argument that is left out is none to cut"
    assert [output.item() for output in model(image, text=None)] == [3, 3]


def test_a_star_stands_for_every_module_of_a_list() -> None:
    model = Adding()
    shard_sequence(model, SequencePlan({"blocks.*": {"image": Shard(1, ("i",))}}, {}), Axis(2, 0))
    assert [output.item() for output in model(torch.tensor([[1.0, 2, 3]]))] == [3, 3]


# Plans of diffusers.


def test_the_plan_of_flux_cuts_tokens_and_their_positions_and_gathers_the_image() -> None:
    assert plan_from_diffusers(FluxTransformer2DModel, gather_like="hidden_states") == SequencePlan(  # type: ignore[arg-type]
        inputs={
            "": {
                "hidden_states": Shard(1, ("hidden_states",), 3),
                "encoder_hidden_states": Shard(1, ("encoder_hidden_states",), 3),
                "img_ids": Shard(0, ("img_ids",), 2),
                "txt_ids": Shard(0, ("txt_ids",), 2),
            }
        },
        outputs={"proj_out": [Gather(1, "hidden_states")]},
    )


def test_the_plan_of_wan_cuts_outputs_of_its_rope_and_timesteps_only_if_there_is_one_a_token() -> None:
    plan = plan_from_diffusers(WanTransformer3DModel, gather_like="blocks.0.hidden_states")  # type: ignore[arg-type]
    assert plan.inputs == {
        "": {"timestep": Shard(1, ("timestep",), 2)},
        "blocks.0": {"hidden_states": Shard(1, ("blocks.0.hidden_states",), 3)},
    }
    assert plan.outputs == {
        "rope": [Shard(1, ("rope[0]",), 4), Shard(1, ("rope[1]",), 4)],
        "proj_out": [Gather(1, "blocks.0.hidden_states")],
    }


def test_the_plan_of_qwen_image_converts() -> None:
    plan = plan_from_diffusers(QwenImageTransformer2DModel, gather_like="transformer_blocks.0.hidden_states")  # type: ignore[arg-type]
    assert plan.inputs["transformer_blocks.0"].keys() == {"hidden_states", "encoder_hidden_states"}
    assert plan.inputs["transformer_blocks.*"]["encoder_hidden_states_mask"].dim == 1
    assert [how.dim for how in plan.outputs["pos_embed"] if how is not None] == [0, 0]
    assert plan.outputs["proj_out"] == [Gather(1, "transformer_blocks.0.hidden_states")]


def test_a_model_without_a_plan_is_cut_nowhere() -> None:
    assert plan_from_diffusers(torch.nn.Linear(1, 1), gather_like="x") == SequencePlan({}, {})


# A mask over two streams: HunyuanVideo, whose prompts are padded.

EVEN: dict[str, Any] = {"size": (2, 4, 4), "prompt_lengths": [1, 7]}
UNEVEN: dict[str, Any] = {"size": (3, 3, 5), "prompt_lengths": [9, 2]}
"""Frames, height and width in tokens, and how many of the 24 text tokens of each row are not padding."""


@pytest.mark.parametrize("case", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(ulysses=2), ParallelConfig(ring=2), ParallelConfig(ring=2, ulysses=2)],
    ids=str,
)
def test_padded_prompts_over_ranks_come_out_as_on_one(parallel: ParallelConfig, case: dict[str, Any]) -> None:
    (expected,) = run_ranks(draw_with_hunyuan, ParallelConfig(), plan="complete", **case)
    outputs = run_ranks(draw_with_hunyuan, parallel, plan="complete", **case)
    for output in outputs:
        assert np.abs(output - expected).max() < 1e-5
        assert np.array_equal(output, outputs[0])


def test_padding_shows_where_a_mask_is_lost() -> None:
    """Otherwise the comparison above would find no mistake in the mask."""
    (expected,) = run_ranks(draw_with_hunyuan, ParallelConfig(), plan="complete", **EVEN)
    (longer,) = run_ranks(draw_with_hunyuan, ParallelConfig(), plan="complete", **EVEN | {"prompt_lengths": [2, 7]})
    changed = np.abs(longer - expected).reshape(2, -1).max(1)
    assert changed[0] > 1e-2
    assert changed[1] < 1e-5


def test_a_plan_that_cuts_the_mask_as_one_stream_gives_another_picture() -> None:
    (expected,) = run_ranks(draw_with_hunyuan, ParallelConfig(), plan="complete", **EVEN)
    for output in run_ranks(draw_with_hunyuan, ParallelConfig(ulysses=2), plan="mask as one stream", **EVEN):
        assert np.abs(output - expected).max() > 1e-2


def test_a_plan_that_forgets_the_mask_is_an_error_on_every_rank() -> None:
    with pytest.raises(RuntimeError) as caught:
        run_ranks(draw_with_hunyuan, ParallelConfig(ulysses=2), plan="without the mask", **EVEN)
    assert str(caught.value).count("an attention mask of shape [2, 1, 1, 56] is not one over 28 keys") == 2
