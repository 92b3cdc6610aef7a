"""The model families, found by the pipeline class that a checkpoint names. A family is added by one line here."""

from __future__ import annotations

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
