"""Tensors as safetensors blobs: what is read is what was packed, and nothing stays behind."""

from __future__ import annotations

import ctypes
import gc
import json

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from triton_diffusion.stages.packing import pack_contiguous, pack_tensors

TENSORS = {
    "float32": torch.arange(6.0).reshape(2, 3),
    "bfloat16": torch.arange(5.0).bfloat16(),
    "uint8": torch.tensor([1, 255], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "int64": torch.tensor(-7),
    "empty": torch.empty(0, 4),
}


def test_a_blob_is_the_one_of_safetensors_own_save(tmp_path) -> None:
    metadata = {"request": json.dumps({"prompt": "ein Rötel"})}
    blob = pack_contiguous(TENSORS, metadata)
    assert blob == save(TENSORS, metadata)
    assert {name: tensor.tolist() for name, tensor in load(blob).items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }
    (tmp_path / "file").write_bytes(blob)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == metadata


def test_parts_of_a_batch_and_the_same_tensor_twice_are_copied() -> None:
    batch = torch.arange(12.0).reshape(3, 4)
    read = load(pack_tensors({"row": batch[1], "column": batch[:, 1], "again": batch[1], "turned": batch.T}))
    assert torch.equal(read["row"], batch[1])
    assert torch.equal(read["column"], batch[:, 1])
    assert torch.equal(read["again"], batch[1])
    assert torch.equal(read["turned"], batch.T)


def test_files_of_ever_new_lengths_leave_nothing_behind() -> None:
    def num_array_types() -> int:
        gc.collect()
        return sum(type(each) is type(ctypes.c_ubyte * 1) for each in gc.get_objects())

    before = num_array_types()
    for length in range(100_000, 100_200):
        pack_tensors({"media.0": torch.zeros(length, dtype=torch.uint8)})
    assert num_array_types() - before < 10
