"""Which stages each Triton model runs, and on which occasion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import PipelineStage, StageRequest, TickStage
from triton_diffusion.stages.conditioning import ConditioningStage
from triton_diffusion.stages.decoding import DecodingStage
from triton_diffusion.stages.denoising import DenoisingStage
from triton_diffusion.stages.image_encoding import ImageEncodingStage
from triton_diffusion.stages.latent_preparation import LatentPreparationStage
from triton_diffusion.stages.prior_generation import PriorGenerationStage
from triton_diffusion.stages.prompt_cache import PromptCache
from triton_diffusion.stages.text_encoding import TextEncodingStage
from triton_diffusion.stages.timestep_preparation import TimestepPreparationStage


@dataclass(frozen=True)
class StagePlan:
    """The stages of one Triton model (InputValidationStage runs in the chain model)."""

    on_admission: tuple[PipelineStage[StageRequest], ...]
    """Run once, when the request is first put in a batch."""
    on_tick: TickStage[Any]
    """Run at every tick that has a row of the request."""


def make_plan(
    stage_model: str,
    family: ModelFamily,
    components: Components,
    group: RankGroup,
    *,
    prompt_cache_bytes: int = 0,
    may_tile: bool = False,
) -> StagePlan:
    """The plan of a stage model, one of STAGE_MODELS (runtime/work.py)."""
    match stage_model:
        case "prior_generation":
            return StagePlan((), PriorGenerationStage(family, components))
        case "image_encoding":
            return StagePlan((), ImageEncodingStage(family, components))
        case "text_encoding":
            return StagePlan((), TextEncodingStage(family, components, PromptCache(prompt_cache_bytes)))
        case "denoising":
            return StagePlan(
                (
                    ConditioningStage(family, components),
                    TimestepPreparationStage(family, components),
                    LatentPreparationStage(family, components),
                ),
                DenoisingStage(family, components, group),
            )
        case "decoding":
            return StagePlan((), DecodingStage(family, components, may_tile=may_tile))
        case _:
            raise ValueError(f"there is no stage model {stage_model!r}")
