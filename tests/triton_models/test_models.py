"""What a model of the repository does where something goes wrong in it that should not."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest
from safetensors.numpy import save
from tests.triton_models.conftest import Backend, Sender

from triton_diffusion.state import StageHealth, write_health


class Request:
    """A caller's request, which may break when it is read."""

    def __init__(self, id_error: Exception | None = None) -> None:
        self.sender = Sender()
        self._id_error = id_error

    def get_response_sender(self) -> Sender:
        return self.sender

    def request_id(self) -> str:
        if self._id_error is not None:
            raise self._id_error
        return "1"

    def timeout(self) -> int:
        return 0

    def parameters(self) -> str:
        return "no JSON"


def arguments(model: str, **parameters: str) -> dict[str, str]:
    values = {name: {"string_value": value} for name, value in parameters.items()}
    return {"model_name": model, "model_config": json.dumps({"parameters": values})}


def test_a_request_that_cannot_be_read_is_answered_and_so_are_the_others(models: ModuleType) -> None:
    class Model(models.ChainModel):  # type: ignore[name-defined,misc]
        stream = False

    model: Any = Model()
    model.initialize(arguments("diffusion"))
    try:
        broken, other = Request(RuntimeError("no id")), Request()
        model.execute([broken, other])
        for request, text in ((broken, "no id"), (other, "Expecting value")):
            (response,) = request.sender.responses
            assert request.sender.flags == 1
            assert text in response.error().message()
    finally:
        model.finalize()


@pytest.mark.parametrize(
    "answer", [b"nothing", save({}, {"health": '{"stage": "denoising", "mood": "good"}'}), save({})]
)
def test_health_says_which_answer_could_not_be_read(models: ModuleType, backend: Backend, answer: bytes) -> None:
    good = write_health(StageHealth("a", True, ready_replicas=1, num_replicas=1, restarts_total=0))
    backend.stages = {name: lambda _: good for name in ("prior_generation", "image_encoding", "text_encoding")}
    backend.stages |= {"denoising": lambda _: answer, "decoding": lambda _: good}
    model = models.HealthModel()
    model.initialize(arguments("health", image_encoding_model="", prior_generation_model=""))
    request = Request()
    model.execute([request])
    model.finalize()
    (response,) = request.sender.responses
    stages = json.loads(response.tensors["health"].as_numpy().item())["stages"]
    assert stages["decoding"]["ready"]
    assert not stages["denoising"]["ready"]
    assert "its answer could not be read" in stages["denoising"]["reason"]
