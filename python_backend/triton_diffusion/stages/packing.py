"""Tensors as safetensors blobs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import TensorSpec, serialize

# Of an empty tensor, which has none: nothing is read there, but it must not be null.
_ANY_ADDRESS = 8


def pack_tensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A blob of tensors that may be parts of one batch, or even the same tensor twice: each is copied."""
    copies = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return pack_contiguous(copies, metadata)


def pack_contiguous(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A blob of contiguous tensors in main memory.

    As safetensors.torch.save, which has Python make an array type for each length in bytes (numpy.ctypeslib.as_array)
    and keep it for ever: 2 to 5 KiB for every picture whose file is as long as none before.
    """
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr() or _ANY_ADDRESS,
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    return bytes(serialize(specs, metadata=metadata))
