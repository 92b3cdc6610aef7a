"""Stable Diffusion over several ranks: nothing is divided but batches, and the two predictions of guidance."""

from __future__ import annotations

from typing import Any

from triton_diffusion.distributed.sequence import SequencePlan
from triton_diffusion.distributed.tensor_parallel import TensorPlan
from triton_diffusion.loading.checkpoint import Checkpoint


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """None; `ModelFamily.check_parallel` has refused a tp_size above 1."""
    return {}


def sequence_plan(transformer: Any) -> SequencePlan:
    """None: a UNet has no sequence from its entrance to its end, each resolution has its own."""
    return SequencePlan({}, {})
