"""The model families, found by the pipeline class that a checkpoint names. A family is added by one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton_diffusion.config import RequestLimits, StageConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families import (
    flux,
    flux2,
    glm_image,
    hunyuan_video,
    ltx_video,
    qwen_image,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    wan,
    z_image,
)
from triton_diffusion.families.base import ModelFamily, check_backend
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import describe_parameters, describe_tasks

FAMILIES: tuple[ModelFamily, ...] = (
    flux.FAMILY,
    flux2.FAMILY,
    glm_image.FAMILY,
    hunyuan_video.FAMILY,
    ltx_video.FAMILY,
    qwen_image.FAMILY,
    stable_diffusion.FAMILY,
    stable_diffusion_3.FAMILY,
    stable_diffusion_xl.FAMILY,
    wan.FAMILY,
    z_image.FAMILY,
)


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


def describe_checkpoint(checkpoint: Checkpoint, limits: RequestLimits, *, takes_images: bool) -> dict[str, Any]:
    """What a checkpoint can do and what a request to it takes, as plain values.

    takes_images: whether the deployment can encode pictures.
    """
    family = find_family(checkpoint)
    defaults = family.request_defaults(checkpoint, takes_images=takes_images)
    return {
        "family": family.name,
        "pipeline_class": checkpoint.pipeline_class,
        "tasks": describe_tasks(defaults),
        "parameters": describe_parameters(defaults, limits),
    }


def check_parallel(checkpoint: Checkpoint, configs: Mapping[str, StageConfig]) -> None:
    """Find out from its files alone whether the ranks of each stage model can share a checkpoint's components.

    Raises:
        ConfigurationError: with the degrees that would work.
    """
    family = find_family(checkpoint)
    for stage_model, config in configs.items():
        family.check_parallel(stage_model, checkpoint, config.parallel(stage_model))
        if stage_model in ("decoding", "image_encoding"):
            family.check_tiles(config.ranks_per_replica, config.vae_tiling)
        if stage_model == "denoising" and not family.denoisers:
            check_backend(family.name, config.attention_backend)


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Find out from its files alone whether a checkpoint can be served; raises ConfigurationError."""
    family = find_family(checkpoint)
    family.defaults(checkpoint)
    for names in family.stage_components(checkpoint).values():
        for name in names:
            # Models have a config.json, tokenizers and noise schedulers have files of other names.
            if (checkpoint.component_path(name) / "config.json").is_file():
                checkpoint.require_safetensors(name)


def families_table() -> str:
    """Family x task x layout x batching, in Markdown: README has it."""
    rows = [
        "| family | checkpoints of | tasks | ranks of denoising share | ranks of decoding share |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        pipelines = ", ".join(f"`{name}`" for name in family.pipeline_classes)
        layouts = "tensor, Ulysses, ring, CFG" if family.denoisers else "CFG (a UNet has no other)"
        rows.append(f"| `{family.name}` | {pipelines} | {', '.join(family.tasks)} | {layouts} | tiles |")
    return "\n".join(rows)
