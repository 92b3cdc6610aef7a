"""Load a component that tensor parallelism divides: of each weight, only the part of this rank is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from triton_diffusion.distributed.mesh import Axis
from triton_diffusion.distributed.tensor_parallel import TensorPlan, add_communication, local_slice, shard_specs
from triton_diffusion.errors import ConfigurationError

logger = logging.getLogger(__name__)


def load_slices(
    component_class: Any, path: Path, *, dtype: torch.dtype, device: torch.device, plan: TensorPlan, tp: Axis
) -> torch.nn.Module:
    """Build the component of the folder `path` without weights, and fill it from its safetensors files.

    component_class: a model of diffusers or of transformers.

    Raises:
        ConfigurationError: the files do not fit the class, or `plan` does not fit the degree.
    """
    module: torch.nn.Module
    with init_empty_weights(include_buffers=False):
        if issubclass(component_class, ModelMixin):
            module = component_class.from_config(component_class.load_config(path))
        else:
            module = component_class(component_class.config_class.from_pretrained(path, local_files_only=True))
    specs = shard_specs(module, plan, tp.degree)
    # As from_pretrained does: diffusers keeps these whole in every type, transformers in float16 alone.
    keeps = issubclass(component_class, ModelMixin) or dtype == torch.float16
    in_float32 = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if keeps else set()
    name_of = _renaming(module, path)
    unknown: list[str] = []
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118, it is no dict
                key, part = name_of(stored), tensors.get_slice(stored)
                part = local_slice(part, specs[key], tp) if key in specs else part[:]
                if part.is_floating_point():
                    part = part.to(torch.float32 if in_float32 & set(key.split(".")) else dtype)
                # load_state_dict would refuse the slices for their shape.
                unknown += _put(module, key, part.to(device))
    # Weights that the published files have and no model uses.
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    if unknown := [key for key in unknown if not any(re.search(pattern, key) for pattern in ignored)]:
        logger.warning("%s has weights that %s does not use: %s", path, component_class.__name__, ", ".join(unknown))
    if tie := getattr(module, "tie_weights", None):
        tie()
    if left := sorted(key for key, tensor in module.named_parameters() if tensor.is_meta):
        raise ConfigurationError(
            f"the weights in {path} do not fit {component_class.__name__}: {', '.join(left)} are missing; "
            "copy the whole checkpoint"
        )
    add_communication(module, plan, tp)
    return module.to(device).eval().requires_grad_(False)


def _renaming(module: torch.nn.Module, path: Path) -> Callable[[str], str]:
    """From the names in the files to those of the module's parameters.

    transformers has moved modules of many models since their checkpoints were published (and writes the old names), and
    reads a model without its head from the files of one with it: its own tables know how.
    """
    if not isinstance(module, PreTrainedModel):
        return lambda stored: stored
    conversions = get_model_conversion_mapping(module)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    names = module.state_dict()

    def name_of(stored: str) -> str:
        name, converted = rename_source_key(stored, renamings, converters, module.base_model_prefix, names)
        if converted is not None:
            raise ConfigurationError(
                f"{path} has {stored!r}, of which transformers makes {name!r} of {type(module).__name__} by more than "
                "another name, so that no part of it can be read; use tp_size=1 for this stage"
            )
        return name

    return name_of


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
