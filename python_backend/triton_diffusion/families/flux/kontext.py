"""FLUX.1 Kontext: which sizes it takes pictures in, and how one is chosen."""

from __future__ import annotations

# Pixels of a picture of any of these sizes, nearly: what it is to the transformer.
PREFERRED_AREA = 1024 * 1024

# (height, width) that it was trained on (diffusers, PREFERRED_KONTEXT_RESOLUTIONS), with those turned on their side.
_PORTRAITS = (
    (1568, 672),
    (1504, 688),
    (1456, 720),
    (1392, 752),
    (1328, 800),
    (1248, 832),
    (1184, 880),
    (1104, 944),
)
PREFERRED_SIZES = (*_PORTRAITS, (1024, 1024), *((width, height) for height, width in _PORTRAITS))


def preferred_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """(height, width) that a picture is resized to: of the nearest aspect ratio, in multiples of `multiple` pixels."""
    aspect_ratio = _floor(width, multiple) / _floor(height, multiple)
    _, nearest_width, nearest_height = min((abs(aspect_ratio - w / h), w, h) for h, w in PREFERRED_SIZES)
    return _floor(nearest_height, multiple), _floor(nearest_width, multiple)


def _floor(size: int, multiple: int) -> int:
    return max(1, size // multiple) * multiple
