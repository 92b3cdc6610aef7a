"""A picture to bytes."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def encode_picture(picture: np.ndarray[Any, np.dtype[np.uint8]], output_format: str, quality: int) -> bytes:
    """A picture uint8 (H, W, 3) as b64_png, png, jpeg or webp; quality 1 to 100 counts for jpeg and webp."""
    name = output_format.removeprefix("b64_")
    options = {"compress_level": 4} if name == "png" else {"quality": quality}
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, name, **options)
    data = buffer.getvalue()
    return base64.b64encode(data) if output_format.startswith("b64_") else data
