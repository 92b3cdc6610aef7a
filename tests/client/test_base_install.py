"""The client is the base install: it must stay small."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import triton_diffusion_client


@pytest.mark.parametrize(
    "statement",
    [
        "import triton_diffusion_client",
        "from triton_diffusion_client import DiffusionClient; DiffusionClient().close()",
        "from triton_diffusion_client import DiffusionClient; DiffusionClient(protocol='http').close()",
        "import triton_diffusion_client._generate_command",
        "import triton_diffusion_client._cancel_command",
        "import triton_diffusion_client._families_command",
        "import triton_diffusion_client._health_command",
        "import triton_diffusion_client._model_control_command",
    ],
)
def test_nothing_of_the_server_is_imported(statement: str) -> None:
    heavy = ["torch", "diffusers", "transformers", "safetensors", "triton_diffusion", "PIL"]
    script = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_public_surface_is_complete() -> None:
    for name in triton_diffusion_client.__all__:
        assert getattr(triton_diffusion_client, name) is not None
    errors = {name for name in vars(triton_diffusion_client.errors) if name.endswith("Error")}
    assert errors <= set(triton_diffusion_client.__all__)
