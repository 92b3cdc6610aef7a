"""FLUX.2 latents as patches, normalized by the running statistics that its autoencoder has kept of them."""

from __future__ import annotations

from typing import Any

import torch


def normalized(vae: Any, patches: torch.Tensor) -> torch.Tensor:
    """Patches (B, S, C * 4) of latents to what the transformer knows."""
    mean, deviation = _statistics(vae, patches)
    return (patches - mean) / deviation


def denormalized(vae: Any, patches: torch.Tensor) -> torch.Tensor:
    """The way back."""
    mean, deviation = _statistics(vae, patches)
    return patches * deviation + mean


def _statistics(vae: Any, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (C * 4,)."""
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return vae.bn.running_mean.to(patches.device, patches.dtype), deviation.to(patches.device, patches.dtype)
