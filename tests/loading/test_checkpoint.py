"""Finding a checkpoint, and refusing what is none, without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import DEMO_CHECKPOINT, open_checkpoint


@pytest.fixture
def checkpoint_copy(flux_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(flux_checkpoint, tmp_path / "checkpoint")


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_in_diffusers_layout_opens(flux_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(flux_checkpoint))
    assert checkpoint.pipeline_class == "FluxPipeline"
    assert checkpoint.component_class("vae") == ("diffusers", "AutoencoderKL")
    assert checkpoint.config("vae")["latent_channels"] == 4


def test_demo_means_the_checkpoint_of_this_package() -> None:
    assert open_checkpoint("demo").path == DEMO_CHECKPOINT


def test_a_missing_folder_is_named_as_it_was_looked_for() -> None:
    with pytest.raises(ConfigurationError, match=r"there is no folder /nowhere/flux; .*hub id") as caught:
        open_checkpoint("/nowhere/flux")
    assert "model_path='/nowhere/flux'" in str(caught.value)


def test_a_missing_relative_folder_is_named_with_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=f"there is no folder {tmp_path}/flux;"):
        open_checkpoint("./flux")


def test_a_folder_without_an_index_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no model_index.json; .*from_single_file"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\ufffd{"])
def test_an_index_that_is_no_json_object_is_refused_with_its_path(checkpoint_copy: Path, text: str) -> None:
    (checkpoint_copy / "model_index.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"model_index\.json"):
        find_family(open_checkpoint(str(checkpoint_copy)))


def test_an_unknown_pipeline_is_refused_with_the_known_ones(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "model_index.json", _class_name="WuerstchenPipeline")
    with pytest.raises(ConfigurationError, match=r"WuerstchenPipeline, which no family here serves; .*FluxPipeline"):
        find_family(open_checkpoint(str(checkpoint_copy)))


@pytest.mark.parametrize("entry", [None, [None, None], "vae", ["diffusers"]])
def test_a_component_that_the_index_does_not_name_is_missing(checkpoint_copy: Path, entry: object) -> None:
    edit_json(checkpoint_copy / "model_index.json", vae=entry)
    with pytest.raises(ConfigurationError, match="has no component 'vae', which FluxPipeline needs"):
        open_checkpoint(str(checkpoint_copy)).component_class("vae")


def test_a_component_without_its_folder_is_missing(checkpoint_copy: Path) -> None:
    shutil.rmtree(checkpoint_copy / "vae")
    with pytest.raises(ConfigurationError, match="has no folder 'vae'"):
        open_checkpoint(str(checkpoint_copy)).config("vae")


def test_a_missing_configuration_file_is_named(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "vae" / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"vae/config\.json"):
        open_checkpoint(str(checkpoint_copy)).config("vae")


# Weights.


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "flux.ckpt", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_out(checkpoint_copy: Path, name: str) -> None:
    folder = checkpoint_copy / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / name)
    with pytest.raises(ConfigurationError, match=f"has only {name}: .*save_pretrained.*safe_serialization=True"):
        open_checkpoint(str(checkpoint_copy)).require_safetensors("transformer")


def test_pickled_weights_beside_safetensors_do_no_harm(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "transformer" / "old.bin").write_bytes(b"x")
    open_checkpoint(str(checkpoint_copy)).require_safetensors("transformer")


def test_no_weights_at_all_look_like_a_broken_download(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        ConfigurationError, match=r"no .*safetensors file: the checkpoint is incomplete; run `hf download`"
    ):
        open_checkpoint(str(checkpoint_copy)).require_safetensors("transformer")


# The hub.


def open_offline(model_path: str, hf_home: Path, cwd: Path) -> str:
    """What open_checkpoint says in a process that may not use the network; the variables are read at import."""
    code = (
        "import sys\n"
        "from triton_diffusion.errors import ConfigurationError\n"
        "from triton_diffusion.loading.checkpoint import open_checkpoint\n"
        "try:\n"
        "    print(open_checkpoint(sys.argv[1]).path)\n"
        "except ConfigurationError as error:\n"
        "    print('refused:', error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    result = subprocess.run(
        [sys.executable, "-c", code, model_path],
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hf_home)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_hub_id_that_is_not_cached_names_folder_and_cache_when_offline(tmp_path: Path) -> None:
    said = open_offline("black-forest-labs/FLUX.1-schnell", tmp_path / "hf", tmp_path)
    assert said.startswith("refused:")
    assert f"{tmp_path}/black-forest-labs/FLUX.1-schnell" in said
    assert f"{tmp_path}/hf/hub/models--black-forest-labs--FLUX.1-schnell" in said
    assert "hf download black-forest-labs/FLUX.1-schnell" in said


def test_a_hub_id_that_is_cached_opens_offline(flux_checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hf" / "hub" / "models--someone--tiny-flux"
    snapshot = cache / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(flux_checkpoint, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(snapshot.name)
    assert open_offline("someone/tiny-flux", tmp_path / "hf", tmp_path) == str(snapshot)


def test_a_local_folder_goes_before_a_hub_id_of_the_same_name(flux_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(flux_checkpoint, tmp_path / "models" / "flux")
    assert open_offline("models/flux", tmp_path / "hf", tmp_path) == "models/flux"


@pytest.mark.parametrize("model_path", ["my models/flux", "models/", "a/b--c..d", "models/flux?"])
def test_a_missing_folder_that_could_not_be_a_hub_id_is_refused_too(model_path: str, tmp_path: Path) -> None:
    assert open_offline(model_path, tmp_path / "hf", tmp_path).startswith("refused:")
