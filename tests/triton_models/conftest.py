"""The modules of the models, where there is no Triton: what they import of it is a double.

For what cannot be made to happen in a real server; all else is in tests/end_to_end.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest


class Tensor:
    """pb_utils.Tensor."""

    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError:
    """pb_utils.TritonError."""

    INTERNAL, UNAVAILABLE = "INTERNAL", "UNAVAILABLE"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class InferenceResponse:
    """pb_utils.InferenceResponse."""

    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor for tensor in output_tensors}
        self._error = error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Sender:
    """A response sender that keeps what it is given."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.flags = 0

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        self.responses.append(response)
        self.flags |= flags


class StageRequest:
    """pb_utils.InferenceRequest, to a stage of the double."""

    def __init__(self, backend: Backend, *, model_name: str, inputs: list[Tensor], **_: Any) -> None:
        self._ask = backend.stages[model_name]
        self._blob = inputs[0].as_numpy().tobytes()

    def exec(self) -> InferenceResponse:
        return InferenceResponse([Tensor("state", np.frombuffer(self._ask(self._blob), np.uint8))])


class Backend(ModuleType):
    """triton_python_backend_utils with stages that answer as a test tells them to."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonModelException = Exception
    Tensor, TritonError, InferenceResponse = Tensor, TritonError, InferenceResponse

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")
        self.stages: dict[str, Callable[[bytes], bytes]] = {}
        self.InferenceRequest = partial(StageRequest, self)

    @staticmethod
    def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor:
        return response.tensors[name]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Triton's module; the modules that import it are imported anew."""
    double = Backend()
    monkeypatch.setitem(sys.modules, double.__name__, double)
    monkeypatch.setenv("TRITON_DIFFUSION_RUN_FOLDER", "")
    before = set(sys.modules)
    yield double
    for name in set(sys.modules) - before:
        if name.startswith("triton_diffusion.triton"):
            del sys.modules[name]


@pytest.fixture
def models(backend: Backend) -> ModuleType:
    """triton_diffusion.triton."""
    return importlib.import_module("triton_diffusion.triton")
