"""The cfg axis: each of its ranks makes a part of a batch of predictions, and all get the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.distributed.mesh import split_sizes


def cfg_share(group: RankGroup, num_predictions: int) -> slice:
    """Which of so many predictions this rank makes. With two, a conditional and an unconditional one: one each."""
    cfg = group.mesh.cfg
    sizes = split_sizes(num_predictions, cfg.degree)
    start = sum(sizes[: cfg.rank])
    return slice(start, start + sizes[cfg.rank])


def run_cfg_parallel(
    group: RankGroup, num_predictions: int, predict: Callable[[], torch.Tensor]
) -> torch.Tensor | None:
    """Call `predict` for this rank's share (n, ...) and return all (num_predictions, ...).

    Every rank of the group must call this. An exception of `predict` is raised on the rank where it came up; the others
    get None, and learn what it was when the ranks agree (RankGroup.agree). None is left waiting for the failed one.
    """
    cfg = group.mesh.cfg
    if cfg.degree == 1:
        return predict()
    own: torch.Tensor | None = None
    try:
        own = predict()
    finally:
        all_ok = group.all_ok(own is not None)
    if not all_ok:
        return None
    return cfg.all_gather(own, split_sizes(num_predictions, cfg.degree), dim=0)
