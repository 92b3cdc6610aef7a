"""What families share about latents: their noise, and the sequence of 2 x 2 patches that transformers take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from triton_diffusion.families.base import Schedule

# Latent pixels along a side of a patch.
PATCH_SIZE = P = 2


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype) -> torch.Tensor:
    """Noise (len(generators), *shape), on the CPU, each row from its own generator.

    So it is the same on every device and rank, and the same as that of a diffusers pipeline with
    `generator=[torch.Generator().manual_seed(seed), ...]`.
    """
    return torch.cat([torch.randn(1, *shape, generator=generator, dtype=dtype) for generator in generators])


def sample_moments(moments: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One sample (len(generators), C, ...) for each generator of the autoencoder's moments (1, 2C, ...).

    As diffusers' retrieve_latents with sample_mode="sample" draws it; the moments are on the CPU.
    """
    distribution = DiagonalGaussianDistribution(moments)
    return torch.cat([distribution.sample(generator) for generator in generators])


def noised_picture(
    moments: torch.Tensor,
    schedule: Schedule,
    generators: Sequence[torch.Generator],
    scaling: float | torch.Tensor,
    shift: float | torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Where rows start that change a picture: its latents (len(generators), C, h, w) at the first sigma.

    moments: of the autoencoder (1, 2C, h, w), on the CPU. scaling, shift: numbers, or (C, 1, 1). dtype: of latents and
    noise, by default that of the moments. Each row samples its own latents of the picture, and draws its noise behind
    that: so a row is the same alone, and that of a diffusers img2img pipeline that is given the picture once for each
    output. (Given it once for all, the pipelines of flow matching sample it for the first alone.)
    """
    dtype = dtype or moments.dtype
    picture = ((sample_moments(moments, generators).to(dtype) - shift) * scaling).to(dtype)
    noise = draw_noise(picture.shape[1:], generators, dtype)
    first = schedule.timesteps[:1].expand(len(generators))
    noise_scheduler = schedule.noise_scheduler
    # Flow matching mixes the two, the older schedules add the one to the other.
    latents: torch.Tensor = (
        noise_scheduler.scale_noise(picture, first, noise)
        if hasattr(noise_scheduler, "scale_noise")
        else noise_scheduler.add_noise(picture, noise, first)
    )
    return latents


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H/2 * W/2, C * 4), channels and patch pixels in the order of FluxPipeline._pack_latents."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // P, P, width // P, P).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // P) * (width // P), channels * P * P)


def unpack_latents(latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(B, rows * columns, C * 4) to (B, C, rows * 2, columns * 2); `rows` and `columns` count patches."""
    batch, _, size = latents.shape
    channels = size // (P * P)
    patches = latents.reshape(batch, rows, columns, channels, P, P).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels, rows * P, columns * P)
