"""The pictures that stand beside the one that FLUX.2 draws: which ones it takes, and in which size."""

from __future__ import annotations

import math

from triton_diffusion.errors import InvalidRequestError

# diffusers' Flux2Pipeline scales larger ones down to so many pixels.
LARGEST_AREA = 1024 * 1024
# diffusers' Flux2ImageProcessor refuses what is smaller or narrower.
SMALLEST_SIDE = 64
LARGEST_ASPECT_RATIO = 8


def check_reference(height: int, width: int) -> None:
    """Raise InvalidRequestError for a picture that FLUX.2 makes nothing of."""
    if min(height, width) < SMALLEST_SIDE:
        raise InvalidRequestError(
            f"a picture is {height} x {width} pixels; this model needs {SMALLEST_SIDE} a side: send a larger one"
        )
    if max(height, width) > LARGEST_ASPECT_RATIO * min(height, width):
        raise InvalidRequestError(
            f"a picture is {height} x {width} pixels; a side may be {LARGEST_ASPECT_RATIO} times the other: cut it"
        )


def scaled_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) that a picture is scaled to: its own, unless it is too large."""
    if height * width <= LARGEST_AREA:
        return height, width
    scale = math.sqrt(LARGEST_AREA / (width * height))
    return int(height * scale), int(width * scale)


def cropped_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """(height, width) that is left of a picture: whole tokens, from its middle."""
    scaled_height, scaled_width = scaled_size(height, width)
    return scaled_height // multiple * multiple, scaled_width // multiple * multiple
