"""A checkpoint folder in diffusers layout, read without torch: which components it has and how they are configured."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_diffusion.errors import ConfigurationError

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_CHECKPOINT = Path(__file__).parents[1] / "demo_checkpoint"
INDEX = "model_index.json"
_UNSAFE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_HUB_FILES = ["*.json", "*.txt", "*.model", "*/*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder."""

    path: Path
    _read: dict[Path, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    """Files that were read already."""

    @property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        return self._json(self.path / INDEX)

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that the checkpoint is for, such as "FluxPipeline"."""
        return str(self.index.get("_class_name"))

    def component_class(self, name: str) -> tuple[str, str]:
        """(library, class) of a component, such as ("diffusers", "AutoencoderKL")."""
        entry = self.index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or None in entry:
            raise ConfigurationError(
                f"{self.path / INDEX} has no component {name!r}, which {self.pipeline_class} needs"
            )
        return entry[0], entry[1]

    def component_path(self, name: str) -> Path:
        """The folder of a component."""
        path = self.path / name
        if not path.is_dir():
            raise ConfigurationError(
                f"{self.path} has no folder {name!r} that its {INDEX} names; copy the whole checkpoint"
            )
        return path

    def config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        """A configuration file of a component."""
        return self._json(self.component_path(name) / file)

    def setting(self, name: str, key: str, file: str = "config.json") -> Any:
        """One value of a component's configuration; raises ConfigurationError if it is not there."""
        config = self.config(name, file)
        if key not in config:
            raise ConfigurationError(
                f"{self.component_path(name) / file} has no {key!r}; is it a {self.pipeline_class}?"
            )
        return config[key]

    def weight_bytes(self) -> int:
        """Size of all files with weights."""
        return sum(path.stat().st_size for path in self.path.glob("*/*.safetensors"))

    def require_safetensors(self, name: str) -> None:
        """Refuse a component that only has pickled weights.

        Raises:
            ConfigurationError: the folder of `name` has no safetensors file.
        """
        path = self.component_path(name)
        if any(path.glob("*.safetensors")):
            return
        unsafe = sorted(file.name for file in path.iterdir() if file.suffix in _UNSAFE_SUFFIXES)
        if unsafe:
            raise ConfigurationError(
                f"{path} has only {', '.join(unsafe)}: pickled weights can run code when they are opened, "
                "so they are not loaded; convert them once where you trust them: load the pipeline with diffusers "
                "and call save_pretrained(folder, safe_serialization=True)"
            )
        raise ConfigurationError(
            f"{path} has no *.safetensors file: the checkpoint is incomplete; run `hf download` again, or copy it whole"
        )

    def _json(self, path: Path) -> dict[str, Any]:
        if path not in self._read:
            self._read[path] = _read_json(path)
        return self._read[path]


def open_checkpoint(model_path: str) -> Checkpoint:
    """Find the folder that `model_path` means: "demo", a local folder, or a hub id (from its cache, else downloaded).

    Raises:
        ConfigurationError: there is no such checkpoint; the message names the folders that were looked for.
    """
    path = DEMO_CHECKPOINT if model_path == DEMO else Path(model_path).expanduser()
    if not path.is_dir() and _is_hub_id(model_path):
        path = _hub_folder(model_path)
    if not path.is_dir():
        raise ConfigurationError(
            f"model_path={model_path!r}: there is no folder {path.absolute()}; give a folder in diffusers layout, "
            f"a hub id such as black-forest-labs/FLUX.1-schnell, or {DEMO!r}"
        )
    if not (path / INDEX).is_file():
        raise ConfigurationError(
            f"{path.absolute()} has no {INDEX}; a checkpoint must be in diffusers layout "
            "(single-file checkpoints: load them with diffusers' from_single_file and call save_pretrained)"
        )
    return Checkpoint(path)


def _is_hub_id(model_path: str) -> bool:
    return model_path.count("/") == 1 and not model_path.startswith((".", "~", "/"))


def _hub_folder(model_path: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    cache = Path(constants.HF_HUB_CACHE) / f"models--{model_path.replace('/', '--')}"
    looked_for = f"looked for the folder {Path(model_path).absolute()} and the hub cache {cache}"
    try:
        return Path(snapshot_download(model_path, local_files_only=True))
    except HFValidationError:
        # No hub id after all; the caller says which folder is missing.
        return Path(model_path)
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        raise ConfigurationError(
            f"model_path={model_path!r} is not on this machine: {looked_for}; HF_HUB_OFFLINE is set, so nothing is "
            f"downloaded; run `hf download {model_path}` where there is a network, or give a local folder"
        )
    logger.info("downloading %s from the hub into %s", model_path, cache)
    try:
        return Path(snapshot_download(model_path, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"model_path={model_path!r} is not on this machine and could not be downloaded: {looked_for}; "
            f"run `hf download {model_path}` where there is a network, or give a local folder ({_first_line(error)})"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {os.fspath(path)}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} must hold a JSON object")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
