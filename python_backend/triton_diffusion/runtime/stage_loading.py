"""Load a stage on a rank: its components, shared with the other ranks as the mesh says, and what runs them."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from triton_diffusion.config import VaeTiling
from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.distributed.mesh import Mesh
from triton_diffusion.distributed.tiles import share_tiles
from triton_diffusion.distributed.transformer import prepare_transformer
from triton_diffusion.errors import DiffusionError
from triton_diffusion.families.base import ModelFamily, check_backend
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.loading.components import Components, find_class, load_components
from triton_diffusion.loading.packed_linears import pack_for_cpu
from triton_diffusion.runtime.faults import ordered_faults
from triton_diffusion.runtime.rank_executor import RankExecutor
from triton_diffusion.runtime.work import tokens_per_row
from triton_diffusion.stages.plan import make_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedStage:
    """What a rank has loaded."""

    executor: RankExecutor
    family: ModelFamily
    components: Components


def import_stage(stage_model: str, model_path: str) -> None:
    """Import the classes that `load_stage` will need, where that is possible; what is wrong shows when it is called."""
    with contextlib.suppress(DiffusionError):
        checkpoint = open_checkpoint(model_path)
        for name in find_family(checkpoint).stage_components(checkpoint)[stage_model]:
            find_class(checkpoint, name)


def load_stage(
    stage_model: str,
    model_path: str,
    group: RankGroup,
    *,
    dtype: torch.dtype,
    attention_backend: str = "auto",
    pack_linears: bool = True,
    vae_tiling: VaeTiling = "auto",
    prompt_cache_bytes: int = 0,
    checkpoint_steps: int = 0,
) -> LoadedStage:
    """Load one of the STAGE_MODELS (runtime/work.py); every rank of the group must call this.

    Raises:
        ConfigurationError: the checkpoint, the attention backend or an order for faults cannot be used.
    """
    checkpoint = open_checkpoint(model_path)
    family = find_family(checkpoint)
    mesh = group.mesh
    components = load_components(
        checkpoint,
        family.stage_components(checkpoint)[stage_model],
        dtype=dtype,
        device=group.device,
        tensor_plans=family.parallelize.tensor_plans(checkpoint) if mesh.tp.degree > 1 else {},
        tp=mesh.tp,
    )
    if stage_model == "denoising":
        for name in family.denoisers:
            if name in components.loaded:
                _prepare(components[name], family, mesh, attention_backend)
                if pack_linears:
                    pack_for_cpu(components[name])
        if mesh.cfg.degree > 1 and not family.has_true_guidance:
            logger.warning("%s has no unconditional prediction: enable_cfg_parallel divides batches only", family.name)
        if not family.denoisers:
            check_backend(family.name, attention_backend)
    if stage_model in ("decoding", "image_encoding"):
        family.check_tiles(group.size, vae_tiling)
        share_tiles(components["vae"], group, vae_tiling)
    plan = make_plan(
        stage_model,
        family,
        components,
        group,
        prompt_cache_bytes=prompt_cache_bytes,
        # On several ranks, or with "on", it is tiled anyway.
        may_tile=vae_tiling == "auto" and group.size == 1,
    )
    executor = RankExecutor(
        plan,
        group,
        tokens_per_row=partial(tokens_per_row, stage_model, family, checkpoint),
        checkpoint_steps=checkpoint_steps,
        faults=ordered_faults(stage_model, group.rank),
    )
    return LoadedStage(executor, family, components)


def _prepare(transformer: Any, family: ModelFamily, mesh: Mesh, attention_backend: str) -> None:
    if family.own_processors:
        family.parallelize.set_attention_processors(transformer)
    prepare_transformer(
        transformer,
        family.parallelize.sequence_plan(transformer),
        mesh,
        attention_backend,
        head_dim=family.head_dim(transformer.config),
    )
