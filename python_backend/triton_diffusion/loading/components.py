"""Load the components a stage needs, from safetensors straight to the rank's device."""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import safe_open
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from triton_diffusion.distributed.mesh import Axis
from triton_diffusion.distributed.tensor_parallel import TensorPlan, add_communication, local_slice, shard_specs
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
            loaded[name] = _load_slices(checkpoint, name, dtype, device, plan, tp)
        else:
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


def _load_slices(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device, plan: TensorPlan, tp: Axis
) -> torch.nn.Module:
    """Load the slices of this rank: the component is built without weights, then filled from the files."""
    component_class: Any = _find_class(checkpoint, name)
    path = checkpoint.component_path(name)
    checkpoint.require_safetensors(name)
    module: torch.nn.Module
    with init_empty_weights(include_buffers=False):
        if issubclass(component_class, ModelMixin):
            module = component_class.from_config(component_class.load_config(path))
        else:
            module = component_class(component_class.config_class.from_pretrained(path))
    specs = shard_specs(module, plan, tp.degree)
    # As from_pretrained does: diffusers keeps these whole in every type, transformers in float16 alone.
    keeps = issubclass(component_class, ModelMixin) or dtype == torch.float16
    in_float32 = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if keeps else set()
    unknown: list[str] = []
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, it is no dict
                part = tensors.get_slice(key)
                part = local_slice(part, specs[key], tp) if key in specs else part[:]
                if part.is_floating_point():
                    part = part.to(torch.float32 if in_float32 & set(key.split(".")) else dtype)
                # load_state_dict would refuse the slices for their shape.
                unknown += _put(module, key, part.to(device))
    # Weights that the published files have and no model uses.
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    unknown = [key for key in unknown if not any(re.search(pattern, key) for pattern in ignored)]
    if tie := getattr(module, "tie_weights", None):
        tie()
    left = sorted(key for key, tensor in module.named_parameters() if tensor.is_meta)
    if left or unknown:
        raise ConfigurationError(
            f"the weights in {path} do not fit {component_class.__name__}: "
            f"missing {left or 'none'}, not known {unknown or 'none'}; copy the whole checkpoint"
        )
    add_communication(module, plan, tp)
    return module.to(device).eval().requires_grad_(False)


def _put(module: torch.nn.Module, key: str, tensor: torch.Tensor) -> list[str]:
    """Make a tensor the parameter or buffer `key`; returns the key if there is none of that name."""
    path, _, name = key.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return [key]
    if name in owner._parameters:
        owner._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
    elif name in owner._buffers:
        owner._buffers[name] = tensor
    else:
        return [key]
    return []


def _find_class(checkpoint: Checkpoint, name: str) -> type[Any]:
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
