"""Pictures to bytes."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from triton_diffusion.media import encode_picture
from triton_diffusion.request import PICTURE_FORMATS

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
GRADIENT = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 64, 3)).copy()


def test_png_keeps_every_pixel() -> None:
    picture = Image.open(io.BytesIO(encode_picture(PICTURE, "png", 90)))
    assert picture.format == "PNG"
    np.testing.assert_array_equal(np.asarray(picture), PICTURE)


@pytest.mark.parametrize("name", [name for name in PICTURE_FORMATS if name.startswith("b64_")])
def test_a_b64_format_is_the_same_file_as_base64_text(name: str) -> None:
    text = encode_picture(PICTURE, name, 90)
    assert base64.b64decode(text, validate=True) == encode_picture(PICTURE, name.removeprefix("b64_"), 90)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lossy_formats_show_the_same_picture(output_format: str) -> None:
    picture = Image.open(io.BytesIO(encode_picture(GRADIENT, output_format, 95)))
    assert picture.format == output_format.upper()
    assert abs(np.asarray(picture).astype(int) - GRADIENT).mean() < 3


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_a_lower_quality_takes_fewer_bytes(output_format: str) -> None:
    assert len(encode_picture(PICTURE, output_format, 10)) < len(encode_picture(PICTURE, output_format, 95))
