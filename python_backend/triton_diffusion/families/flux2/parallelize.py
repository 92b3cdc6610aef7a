"""FLUX.2 over several ranks: by the plans of diffusers' Flux2Transformer2DModel, and that of its language model."""

from __future__ import annotations

from typing import Any

from diffusers import Flux2Transformer2DModel

from triton_diffusion.distributed.language_model import language_model_plan
from triton_diffusion.distributed.sequence import SequencePlan, plan_from_diffusers
from triton_diffusion.distributed.tensor_parallel import TensorPlan
from triton_diffusion.families.flux2.family import is_klein
from triton_diffusion.loading.checkpoint import Checkpoint


def tensor_plans(checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """The plan of each component that tensor parallelism divides."""
    language_model = "model" if is_klein(checkpoint) else "model.language_model"
    return {
        "transformer": Flux2Transformer2DModel._tp_plan,
        "text_encoder": language_model_plan(language_model, head="lm_head"),
    }


def sequence_plan(transformer: Any) -> SequencePlan:
    """Text and image tokens are cut at the transformer's entrance, and put together behind its last layer."""
    return plan_from_diffusers(transformer, gather_like="hidden_states")
