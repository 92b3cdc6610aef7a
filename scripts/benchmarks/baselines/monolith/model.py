"""The whole pipeline as one Triton model, which draws one request after the other."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# Triton's stub passes it on but does not read it.
sys.path += os.environ["PYTHONPATH"].split(os.pathsep)

from benchmarks.baselines.drawing import draw, load_pipeline_of_benchmark

_NUMBERS = ("height", "width", "num_inference_steps", "max_sequence_length", "guidance_scale", "seed")


class TritonPythonModel:
    """Text in, PNG out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the pipeline."""
        self._pipeline = load_pipeline_of_benchmark()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Draw them one by one: requests of different step counts cannot share a call of the pipeline."""
        return [self._draw(request) for request in requests]

    def _draw(self, request: Any) -> Any:
        asked = {name: _value(request, name).item() for name in _NUMBERS} | {
            "prompt": _value(request, "prompt").decode()
        }
        files = np.array(draw(self._pipeline, [asked]), dtype=np.object_)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("image", files)])


def _value(request: Any, name: str) -> Any:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0]
