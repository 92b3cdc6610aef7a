"""What every baseline does alike: load the pipeline with the settings of the benchmark, and draw PNG files."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.baselines import DTYPE, MODEL_PATH, NUM_THREADS
from benchmarks.pipeline import load_pipeline

# In these alone may pictures of one call of the pipeline differ.
_OF_ONE_PICTURE = ("prompt", "seed")


def load_pipeline_of_benchmark() -> Any:
    """The FluxPipeline that the environment names."""
    return load_pipeline(os.environ[MODEL_PATH], os.environ[DTYPE], int(os.environ[NUM_THREADS]))


def shared_arguments(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments in a request that hold for a whole call."""
    return {name: value for name, value in asked.items() if name not in _OF_ONE_PICTURE}


def draw(pipeline: Any, asked: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """PNG files for requests of equal `shared_arguments`, in one call of the pipeline."""
    pictures = pipeline(
        prompt=[each["prompt"] for each in asked],
        generator=[torch.Generator().manual_seed(each["seed"]) for each in asked],
        **shared_arguments(asked[0]),
    ).images
    return [_encode(picture) for picture in pictures]


def _encode(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=4)
    return buffer.getvalue()
