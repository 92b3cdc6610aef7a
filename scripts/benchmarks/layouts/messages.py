"""What the parent and the ranks tell each other, one line of JSON each."""

from __future__ import annotations

import msgspec

from triton_diffusion.config import ParallelConfig


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a batch."""

    seed: int
    num_inference_steps: int
    guidance_scale: float = 1.0
    joins_at: int = 0
    """The tick in which it runs first."""


class DenoiseJob(msgspec.Struct, frozen=True, kw_only=True):
    """To a rank: denoise these rows, sharing a batch, for so many ticks."""

    checkpoint: str
    dtype: str
    parallel: ParallelConfig
    rank: int
    store: str
    """Path of the file that the ranks meet at."""
    height: int
    width: int
    rows: list[Row]
    num_ticks: int
    warm_up_ticks: int = 0
    """Ticks in front that are not timed."""
    attention_backend: str = "auto"
    keep_open: bool = False
    """Hold the model for further jobs, which may then only differ in rows and ticks; a job without this closes it."""


class Denoised(msgspec.Struct, frozen=True, kw_only=True):
    """From a rank: what came out."""

    latents: list[bytes]
    """float32 of every row, (S, C)."""
    weight_bytes: int
    peak_bytes: int
    """Resident memory at its highest."""
    tick_s: list[float]
    sent_bytes: dict[str, int]
    """By axis, in one tick (the last)."""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """From a rank: why it did not."""

    error: str
