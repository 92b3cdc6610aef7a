"""Share a transformer's sequence among ranks, and have its attention computed by the backend that was chosen."""

from __future__ import annotations

import logging
from typing import Any

from triton_diffusion.attention.choice import choose_backend
from triton_diffusion.attention.diffusers_models import replace_attention
from triton_diffusion.distributed.attention import ParallelAttention
from triton_diffusion.distributed.mesh import Mesh
from triton_diffusion.distributed.sequence import SequencePlan, ShardedSequence, shard_sequence

logger = logging.getLogger(__name__)


def prepare_transformer(
    transformer: Any, plan: SequencePlan, mesh: Mesh, attention_backend: str, *, head_dim: int | None = None
) -> None:
    """Hook a diffusers transformer; every rank must do so, once.

    head_dim: of its attention, if its configuration does not say it.

    Raises:
        ConfigurationError: the attention backend cannot be used.
    """
    backend, reason = choose_backend(
        attention_backend,
        device=transformer.device,
        # Not that of just any parameter: some models keep a few in float32.
        dtype=transformer.dtype,
        head_dim=head_dim or transformer.config.attention_head_dim,
        ring_degree=mesh.ring.degree,
    )
    sequence: ShardedSequence | None = None
    if mesh.sequence.degree > 1:
        sequence = shard_sequence(transformer, plan, mesh.sequence)
    num_modules = replace_attention(
        transformer,
        lambda: ParallelAttention(backend, mesh, sequence),
        leave=plan.whole,
        cross=plan.cross,
        cross_backend=backend,
    )
    logger.info("attention backend of %d modules: %s, since %s", num_modules, backend.name, reason)
