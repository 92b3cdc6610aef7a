"""Z-Image over several ranks: diffusers brings no plans for its transformer, so these are ours."""

from __future__ import annotations

from typing import Any

from triton_diffusion.distributed.language_model import language_model_plan
from triton_diffusion.distributed.sequence import Gather, SequencePlan, Shard
from triton_diffusion.distributed.tensor_parallel import Style, TensorPlan
from triton_diffusion.families.z_image.family import PATCH_SIZE
from triton_diffusion.loading.checkpoint import Checkpoint

# Blocks for the image, the text, and both together.
_REFINERS = ("noise_refiner", "context_refiner")
_BLOCKS = (*_REFINERS, "layers")
_TRANSFORMER: dict[str, Style] = {
    **dict.fromkeys((f"{blocks}.*.attention.to_{name}" for blocks in _BLOCKS for name in "qkv"), "colwise"),
    **dict.fromkeys((f"{blocks}.*.attention.to_out.0" for blocks in _BLOCKS), "rowwise"),
    **dict.fromkeys((f"{blocks}.*.feed_forward.{name}" for blocks in _BLOCKS for name in ("w1", "w3")), "colwise"),
    **dict.fromkeys((f"{blocks}.*.feed_forward.w2" for blocks in _BLOCKS), "rowwise"),
    # Text is refined without regard to the timestep.
    **dict.fromkeys((f"{blocks}.*.adaLN_modulation.0" for blocks in ("noise_refiner", "layers")), "colwise_gather"),
}
_TOKENS = ("tokens",)


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides."""
    return {"transformer": _TRANSFORMER, "text_encoder": language_model_plan()}


def sequence_plan(transformer: Any) -> SequencePlan:
    """The one sequence of image and text is cut in front of the first block for both, behind the few that refine each
    by itself, and put together behind the last layer.
    """
    along = Shard(1, _TOKENS)
    return SequencePlan(
        inputs={"layers.0": {"x": along}, "layers.*": {"attn_mask": along, "freqs_cis": along}},
        outputs={f"all_final_layer.{PATCH_SIZE}-1": [Gather(1, "tokens")]},
        whole=_REFINERS,
    )
