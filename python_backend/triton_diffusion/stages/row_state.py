"""What changes in a row of denoising from step to step: copied behind a step, put back in another process.

That is its latents, its generator, its step, and what its noise scheduler keeps inside, such as the model outputs of
the steps before. Noise schedulers of diffusers are plain objects: their attributes are copied whatever they are called,
but for those that are still the very objects of the beginning, which a fresh one has too. On the wire they are a
safetensors blob: tensors in the body, what is around them as JSON in the metadata. Reading it runs no code of anyone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from triton_diffusion.errors import DiffusionError, StageError
from triton_diffusion.stages.base import DenoiseRow
from triton_diffusion.stages.packing import pack_contiguous
from triton_diffusion.state import read_metadata

_ROWS = "rows"
# What may have changed although it is the object of the beginning; not so the FrozenDict of a configuration.
_CHANGEABLE = (list, dict)


class UnknownStateError(TypeError):
    """A noise scheduler keeps something that cannot be copied, such as a random process of its own."""


class RowStates:
    """A copy of the state of some rows as they stand. From CUDA it comes behind the work that is queued there, into
    pinned memory, and nobody waits for it before `pack`.
    """

    def __init__(self, rows: Sequence[DenoiseRow]) -> None:
        """Raises UnknownStateError: there is a noise scheduler whose state cannot be copied."""
        self._tensors: list[torch.Tensor] = []
        # A tensor that is kept under two names is copied once; as long as it is here, its id is no other's.
        self._numbers: dict[int, tuple[torch.Tensor, int]] = {}
        self._rows = [self._describe_row(row) for row in rows]
        self._numbers.clear()
        self._copied: torch.cuda.Event | None = None
        if any(row.latents.is_cuda for row in rows):
            self._copied = torch.cuda.Event()
            self._copied.record()

    def pack(self) -> bytes:
        """The blob that `restore_rows` reads."""
        if self._copied is not None:
            self._copied.synchronize()
        tensors = {str(number): tensor for number, tensor in enumerate(self._tensors)}
        return pack_contiguous(tensors, {_ROWS: json.dumps(self._rows)})

    def _describe_row(self, row: DenoiseRow) -> dict[str, Any]:
        return {
            "step": row.step,
            "latents": self._describe(row.latents),
            "preview": self._describe(row.preview),
            "generator": self._describe(row.generator.get_state()),
            "noise_scheduler": {
                name: self._describe(value)
                for name, value in vars(row.noise_scheduler).items()
                if type(value) in _CHANGEABLE
                or name not in row.initial_noise_state
                or value is not row.initial_noise_state[name]
            },
        }

    def _describe(self, value: Any) -> Any:
        """The value as JSON, its tensors as numbers of those that are copied."""
        match value:
            # First, since a float64 of numpy is a float of Python, too.
            case np.generic():
                return {"scalar": self._keep(torch.from_numpy(np.array(value)))}
            case np.ndarray():
                return {"ndarray": self._keep(torch.from_numpy(np.array(value)))}
            case None | bool() | int() | float() | str():
                return value
            case list() | tuple() if type(value) in (list, tuple):
                return {type(value).__name__: [self._describe(each) for each in value]}
            case dict() if type(value) is dict:
                return {"dict": [[self._describe(key), self._describe(each)] for key, each in value.items()]}
            case torch.Tensor():
                return {"tensor": self._copy(value), "on_cpu": value.device.type == "cpu"}
            case _:
                raise UnknownStateError(f"there is no way to copy a {type(value).__name__}")

    def _copy(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._numbers:
            if tensor.is_cuda:
                copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copied.copy_(tensor, non_blocking=True)
            else:
                copied = tensor.detach().clone(memory_format=torch.contiguous_format)
            self._numbers[id(tensor)] = tensor, self._keep(copied)
        return self._numbers[id(tensor)][1]

    def _keep(self, copied: torch.Tensor) -> int:
        self._tensors.append(copied)
        return len(self._tensors) - 1


def restore_rows(rows: Sequence[DenoiseRow], blob: bytes) -> None:
    """Put rows that are at their beginning where those were that the blob was made of.

    Raises:
        StageError: the blob is none of rows like these.
    """
    try:
        tensors = load(blob)
        states = json.loads(read_metadata(blob)[0][_ROWS])
        for row, state in zip(rows, states, strict=True):
            _restore(row, state, tensors)
    except (DiffusionError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise StageError(f"a checkpoint does not fit its request ({type(error).__name__}: {error})") from error


def _restore(row: DenoiseRow, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    device = row.latents.device
    latents = _read(state["latents"], tensors, device)
    if latents.shape != row.latents.shape:
        raise ValueError(f"latents of {list(latents.shape)}, not {list(row.latents.shape)}")
    if not 0 <= state["step"] <= len(row.timesteps):
        raise ValueError(f"step {state['step']} of {len(row.timesteps)}")
    row.generator.set_state(_read(state["generator"], tensors, device))
    for name, value in state["noise_scheduler"].items():
        vars(row.noise_scheduler)[name] = _read(value, tensors, device)
    row.latents, row.step = latents, state["step"]
    row.preview = _read(state["preview"], tensors, device)


def _read(value: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    match value:
        case {"tensor": number, "on_cpu": on_cpu}:
            return tensors[str(number)] if on_cpu else tensors[str(number)].to(device)
        case {"ndarray": number}:
            return tensors[str(number)].numpy()
        case {"scalar": number}:
            return tensors[str(number)].numpy()[()]
        case {"list": values}:
            return [_read(each, tensors, device) for each in values]
        case {"tuple": values}:
            return tuple(_read(each, tensors, device) for each in values)
        case {"dict": pairs}:
            return {_read(key, tensors, device): _read(each, tensors, device) for key, each in pairs}
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise ValueError(f"{value!r:.80} is no part of a state")
