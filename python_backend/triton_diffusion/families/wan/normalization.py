"""Between the latents that Wan's autoencoder makes and those of unit variance that its transformer works on."""

from __future__ import annotations

from typing import Any

import torch


def normalize(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """(B, C, F, h, w) of the autoencoder to those of the transformer, channel by channel."""
    mean, scale = _mean_and_scale(vae, latents)
    return (latents - mean) * scale


def denormalize(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The way back."""
    mean, scale = _mean_and_scale(vae, latents)
    return latents / scale + mean


def _mean_and_scale(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each (1, C, 1, 1, 1); rounded to the type first, then inverted, as in WanPipeline."""
    mean, std = (
        like.new_tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, 1.0 / std
