"""Load the components a stage needs, from safetensors straight to the rank's device."""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from triton_diffusion.distributed.mesh import Axis
from triton_diffusion.distributed.tensor_parallel import TensorPlan
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.loading.slices import load_slices

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
    checkpoint: Checkpoint,
    names: Sequence[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    tensor_plans: Mapping[str, TensorPlan] | None = None,
    tp: Axis | None = None,
) -> Components:
    """Load `names` of `checkpoint`, with one log line each.

    Every rank calls this; each reads the files itself (the page cache serves the second reader). Where `tp` has several
    ranks, a component with a tensor plan is divided among them, and each rank reads its slices only.

    Raises:
        ConfigurationError: a component is missing, has only pickled weights, or its class is not installed.
    """
    loaded: dict[str, Any] = {}
    for index, name in enumerate(names, 1):
        started = time.monotonic()
        plan = (tensor_plans or {}).get(name)
        if plan is not None and tp is not None and tp.degree > 1:
            checkpoint.require_safetensors(name)
            loaded[name] = load_slices(
                find_class(checkpoint, name),
                checkpoint.component_path(name),
                dtype=dtype,
                device=device,
                plan=plan,
                tp=tp,
            )
        else:
            loaded[name] = _load_component(checkpoint, name, dtype, device)
        size_mib = _size_bytes(loaded[name]) / 2**20
        logger.info(
            "loaded %s (%d of %d, %.1f MiB) in %.1f s", name, index, len(names), size_mib, time.monotonic() - started
        )
    return Components(checkpoint, device, dtype, loaded)


def _load_component(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    component_class: Any = find_class(checkpoint, name)
    path = checkpoint.component_path(name)
    if not issubclass(component_class, torch.nn.Module):
        if issubclass(component_class, LlamaTokenizer) and _is_byte_level(path):
            component_class = PreTrainedTokenizerFast
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


def _is_byte_level(path: Path) -> bool:
    """Whether a tokenizer splits text as GPT-2's and LLaMA 3's do.

    transformers 5 gives LlamaTokenizer, and so LlamaTokenizerFast, the splitting of LLaMA 1 and 2 whatever its file
    says: a checkpoint that names it for LLaMA 3, such as HunyuanVideo, would get tokens of words without spaces
    (https://github.com/huggingface/transformers/issues/45488).
    """
    file = path / "tokenizer.json"
    return file.is_file() and "ByteLevel" in json.dumps(json.loads(file.read_text()).get("pre_tokenizer"))


def find_class(checkpoint: Checkpoint, name: str) -> type[Any]:
    """The class of a component, imported.

    Raises:
        ConfigurationError: it is not one of diffusers or transformers, or not installed.
    """
    library, class_name = checkpoint.component_class(name)
    if library in dir(diffusers.pipelines) and hasattr(transformers, class_name):
        # save_pretrained names a pipeline's folder, if that is also the name of the folder the class comes from.
        library = "transformers"
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
