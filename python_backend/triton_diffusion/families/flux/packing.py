"""FLUX latents as the autoencoder sees them, (B, C, H, W), and as the transformer does, a sequence of 2 x 2 patches.

The order of channels and patch pixels is that of diffusers' FluxPipeline._pack_latents.
"""

from __future__ import annotations

import torch

from triton_diffusion.families.flux.family import PATCH_SIZE as P


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H/2 * W/2, C * 4)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // P, P, width // P, P).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // P) * (width // P), channels * P * P)


def unpack_latents(latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(B, rows * columns, C * 4) to (B, C, rows * 2, columns * 2); `rows` and `columns` count patches."""
    batch, _, size = latents.shape
    channels = size // (P * P)
    patches = latents.reshape(batch, rows, columns, channels, P, P).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels, rows * P, columns * P)
