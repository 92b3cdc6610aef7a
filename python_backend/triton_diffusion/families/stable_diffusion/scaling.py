"""Between the latents of the autoencoder and those that the UNet was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Of checkpoints that were written before the autoencoder's configuration had it.
SCALING_FACTOR = 0.18215


def scaling_and_shift(
    vae_config: Mapping[str, Any], device: torch.device | None = None
) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """The UNet's latents are (latents - shift) * scaling; numbers, or float32 (C, 1, 1) where channels differ."""
    factor = float(vae_config.get("scaling_factor", SCALING_FACTOR))
    mean, std = vae_config.get("latents_mean"), vae_config.get("latents_std")
    if mean is None or std is None:
        return factor, 0.0
    statistics = torch.tensor([std, mean], device=device)[..., None, None]
    return factor / statistics[0], statistics[1]
