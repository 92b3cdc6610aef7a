"""Loading the components of a stage."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.flux import FAMILY
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.loading.components import Components, load_components

CPU = torch.device("cpu")


def load(folder: Path, *names: str, dtype: torch.dtype = torch.float32) -> Components:
    return load_components(open_checkpoint(str(folder)), names, dtype=dtype, device=CPU)


@pytest.mark.parametrize("stage_model", ["text_encoding", "image_encoding", "denoising", "decoding"])
def test_a_stage_loads_its_own_components_only(flux_checkpoint: Path, tmp_path: Path, stage_model: str) -> None:
    names = FAMILY.stage_components(open_checkpoint(str(flux_checkpoint)))[stage_model]
    folder = shutil.copytree(flux_checkpoint, tmp_path / "checkpoint")
    for path in list(folder.iterdir()):
        if path.is_dir() and path.name not in names:
            shutil.rmtree(path)
    assert tuple(load(folder, *names).loaded) == names


def test_every_component_of_the_checkpoint_belongs_to_a_stage(flux_checkpoint: Path) -> None:
    folders = {path.name for path in flux_checkpoint.iterdir() if path.is_dir()}
    stages = FAMILY.stage_components(open_checkpoint(str(flux_checkpoint)))
    assert {name for names in stages.values() for name in names} == folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_modules_come_with_the_stored_weights_in_the_asked_dtype(
    flux_checkpoint: Path, name: str, dtype: torch.dtype
) -> None:
    module = load(flux_checkpoint, name, dtype=dtype)[name]
    assert not module.training
    assert all(parameter.dtype == dtype and not parameter.requires_grad for parameter in module.parameters())
    (file,) = (flux_checkpoint / name).glob("*.safetensors")
    loaded = module.state_dict()
    for key, stored in load_file(file).items():
        assert torch.equal(loaded[key], stored.to(dtype)), key


def test_pickled_weights_are_never_opened(flux_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(flux_checkpoint, tmp_path / "checkpoint")
    for name in ("transformer", "text_encoder"):
        for file in (folder / name).glob("*.safetensors"):
            file.unlink()
        trap = folder / name / ("pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin")
        trap.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
        with pytest.raises(ConfigurationError, match="pickled weights"):
            load(folder, name)
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_the_trap_of_the_test_above_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["os", "system"], "only classes of diffusers and transformers are loaded"),
        (["diffusers", "NoSuchModel"], "needs diffusers.NoSuchModel, which the installed diffusers does not have"),
        (["diffusers", "logging"], "does not have"),
    ],
)
def test_a_class_from_elsewhere_is_not_loaded(
    flux_checkpoint: Path, tmp_path: Path, entry: list[str], message: str
) -> None:
    folder = shutil.copytree(flux_checkpoint, tmp_path / "checkpoint")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": entry}))
    with pytest.raises(ConfigurationError, match=message):
        load(folder, "vae")
