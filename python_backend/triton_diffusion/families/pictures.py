"""What families share about pictures: between uint8 and what autoencoders take and give."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) or videos (B, 3, F, H, W) in -1..1 to uint8 (B, H, W, 3) or (B, F, H, W, 3), on the CPU.

    To 0..1 in the compute dtype, then rounded in float32: the order of diffusers' VaeImageProcessor.
    """
    scaled = (pictures * 0.5 + 0.5).clamp(0, 1).movedim(1, -1).cpu().float()
    rounded: torch.Tensor = (scaled * 255).round().to(torch.uint8)
    return rounded


def to_pil(image: torch.Tensor) -> Image.Image:
    """A picture uint8 (H, W, 3), as diffusers' and transformers' processors take it."""
    return Image.fromarray(image.cpu().numpy())


def resized(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A picture uint8 (H, W, 3) as autoencoders take it: (1, 3, height, width), float32 in -1..1.

    By Lanczos' filter, as diffusers' VaeImageProcessor does it with what its configuration leaves open.
    """
    return from_pil(to_pil(image).resize((width, height), Image.Resampling.LANCZOS))


def from_pil(picture: Image.Image) -> torch.Tensor:
    """A picture in RGB as autoencoders take it: (1, 3, H, W), float32 in -1..1."""
    scaled = torch.from_numpy(np.array(picture)).float() / 255
    return (2 * scaled - 1).permute(2, 0, 1)[None]
