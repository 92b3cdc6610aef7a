"""The model families, found by the pipeline class that a checkpoint names. A family is added by one line here."""

from __future__ import annotations

from collections.abc import Mapping

from triton_diffusion.config import StageConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families import flux
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.checkpoint import Checkpoint

FAMILIES: tuple[ModelFamily, ...] = (flux.FAMILY,)


def find_family(checkpoint: Checkpoint) -> ModelFamily:
    """The family that serves `checkpoint`; raises ConfigurationError with the known ones."""
    for family in FAMILIES:
        if checkpoint.pipeline_class in family.pipeline_classes:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.pipeline_classes)
    raise ConfigurationError(
        f"{checkpoint.path} is a checkpoint of {checkpoint.pipeline_class}, which no family here serves; "
        f"known ones are {known}"
    )


def check_parallel(checkpoint: Checkpoint, configs: Mapping[str, StageConfig]) -> None:
    """Find out from its files alone whether the ranks of each stage model can share a checkpoint's components.

    Raises:
        ConfigurationError: with the degrees that would work.
    """
    family = find_family(checkpoint)
    for stage_model, config in configs.items():
        family.check_parallel(stage_model, checkpoint, config.parallel(stage_model))


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Find out from its files alone whether a checkpoint can be served; raises ConfigurationError."""
    family = find_family(checkpoint)
    family.defaults(checkpoint)
    for names in family.stage_components.values():
        for name in names:
            # Models have a config.json, tokenizers and noise schedulers have files of other names.
            if (checkpoint.component_path(name) / "config.json").is_file():
                checkpoint.require_safetensors(name)
