"""Load the components a stage needs, from safetensors straight to the rank's device."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.loading.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """The loaded components of one stage, by their names in model_index.json."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    loaded: dict[str, Any]
    """Modules (in eval mode, on the device), tokenizers, a noise scheduler."""

    def __getitem__(self, name: str) -> Any:
        return self.loaded[name]


def load_components(
    checkpoint: Checkpoint, names: Sequence[str], *, dtype: torch.dtype, device: torch.device
) -> Components:
    """Load `names` of `checkpoint`, with one log line each.

    Every rank calls this; each reads the files itself (the page cache serves the second reader).

    Raises:
        ConfigurationError: a component is missing, has only pickled weights, or its class is not installed.
    """
    loaded: dict[str, Any] = {}
    for index, name in enumerate(names, 1):
        started = time.monotonic()
        loaded[name] = _load_component(checkpoint, name, dtype, device)
        size_mib = _size_bytes(loaded[name]) / 2**20
        logger.info(
            "loaded %s (%d of %d, %.1f MiB) in %.1f s", name, index, len(names), size_mib, time.monotonic() - started
        )
    return Components(checkpoint, device, dtype, loaded)


def _load_component(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    component_class: Any = _find_class(checkpoint, name)
    path = checkpoint.component_path(name)
    if not issubclass(component_class, torch.nn.Module):
        return component_class.from_pretrained(path, local_files_only=True)
    checkpoint.require_safetensors(name)
    module = component_class.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        device_map={"": str(device)},
    )
    return module.eval().requires_grad_(False)


def _find_class(checkpoint: Checkpoint, name: str) -> type[Any]:
    library, class_name = checkpoint.component_class(name)
    if library not in ("diffusers", "transformers"):
        raise ConfigurationError(
            f"component {name!r} is {library}.{class_name}; only classes of diffusers and transformers are loaded"
        )
    found = getattr(importlib.import_module(library), class_name, None)
    if not isinstance(found, type):
        raise ConfigurationError(
            f"component {name!r} needs {library}.{class_name}, which the installed {library} does not have"
        )
    return found


def _size_bytes(component: Any) -> int:
    if not isinstance(component, torch.nn.Module):
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in component.state_dict().values())
