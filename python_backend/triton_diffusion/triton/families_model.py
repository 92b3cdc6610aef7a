"""FamiliesModel: says what the checkpoint that is served can do, and what a request to it takes."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from triton_diffusion.config import FamiliesConfig
from triton_diffusion.errors import DiffusionError
from triton_diffusion.families.registry import describe_checkpoint
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.triton.conversion import (
    json_tensor,
    read_inputs,
    read_parameters,
    set_up_logging,
    triton_error,
)
from triton_diffusion.triton.heartbeat import Heartbeat


class FamiliesModel:
    """Answers from what it worked out when it was loaded."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the checkpoint's configuration files."""
        set_up_logging(args["model_name"])
        try:
            config = FamiliesConfig.from_parameters(read_parameters(args))
            takes_images = bool(config.image_encoding_model)
            description = describe_checkpoint(open_checkpoint(config.model_path), config, takes_images=takes_images)
        except DiffusionError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._families = [description]
        self._heartbeat = Heartbeat()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer for each request."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Nothing is under way."""
        self._heartbeat.stop()

    def _answer(self, request: Any) -> Any:
        try:
            name = read_inputs(request, ("name",)).get("name")
        except Exception as error:
            return pb_utils.InferenceResponse(error=triton_error(error))
        families = [family for family in self._families if name in (None, "", family["family"])]
        return pb_utils.InferenceResponse([json_tensor("families", families)])
