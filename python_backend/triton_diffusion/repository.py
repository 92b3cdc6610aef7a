"""Build a model repository for a checkpoint: a copy of model_repository/ with parameters set in its
config.pbtxt files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from triton_diffusion.config import CancellationConfig, ChainConfig, StageConfig
from triton_diffusion.errors import ConfigurationError, nearest_name_hint
from triton_diffusion.runtime.work import STAGE_MODELS

# Written beside the models, so that a later build knows which folders it may replace.
_MARKER = ".triton-diffusion.json"
# Which class reads the parameters of a model; the others are stages.
_READERS: Mapping[str, type[ChainConfig | CancellationConfig]] = {
    "diffusion": ChainConfig,
    "diffusion_stream": ChainConfig,
    "cancellation": CancellationConfig,
}
# Triton refuses a response cache for a decoupled model.
_CACHED_MODEL = "diffusion"


def find_model_repository() -> Path:
    """The folder model_repository/ of the installed package, or of the checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "model_repository", package.parent.parent / "model_repository"):
        if folder.is_dir():
            return folder
    raise ConfigurationError(f"model_repository/ is not beside {package}; install triton-diffusion anew")


def build_repository(
    destination: str | Path, settings: Mapping[str, str], *, force: bool = False, response_cache: bool = False
) -> Path:
    """Write a model repository to `destination` and return its path.

    `settings` maps the name of a parameter to its value. A plain name (`dtype`) sets it in every model that
    has it, a name with a model (`denoising.dtype`) in that model only, and goes before the plain one.

    With `response_cache`, Triton answers a request to `diffusion` from its response cache if it has answered an equal
    one before; the server must be started with such a cache.

    Raises ConfigurationError for a name or a value that no model knows, and for a folder with content that an
    earlier call did not write; `force` then replaces the models of the same names and leaves the rest.
    """
    destination = Path(destination)
    source = find_model_repository()
    configs = {path.parent.name: _read(path) for path in sorted(source.glob("*/config.pbtxt"))}
    _set_parameters(configs, settings)
    for name, config in configs.items():
        _check(name, config)
    if response_cache:
        configs[_CACHED_MODEL].response_cache.enable = True

    _make_room(destination, list(configs), force=force)
    for name, config in configs.items():
        shutil.copytree(source / name, destination / name, ignore=shutil.ignore_patterns("__pycache__"))
        (destination / name / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    (destination / _MARKER).write_text(json.dumps({"models": list(configs)}), encoding="utf-8")
    return destination


def read_stage_configs(folder: Path) -> dict[str, StageConfig]:
    """The configuration of every stage model in a repository; raises ConfigurationError."""
    configs = {name: _read(folder / name / "config.pbtxt") for name in STAGE_MODELS}
    return {name: StageConfig.from_parameters(_parameters(config)) for name, config in configs.items()}


def is_built(folder: Path) -> bool:
    """Whether `build_repository` wrote this folder."""
    return (folder / _MARKER).is_file()


def _read(path: Path) -> Any:
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ConfigurationError(f"{path} is not a model configuration: {error}") from error


def _set_parameters(configs: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    # Names with a model come last, so that they win.
    for name, value in sorted(settings.items(), key=lambda item: "." in item[0]):
        model, _, parameter = name.rpartition(".")
        if model and model not in configs:
            raise ConfigurationError(
                f"setting {name!r}: there is no model {model!r}{nearest_name_hint(model, configs)}; "
                f"models are {', '.join(configs)}"
            )
        candidates = [configs[model]] if model else list(configs.values())
        having = [config for config in candidates if parameter in config.parameters]
        if not having:
            known = sorted({key for config in candidates for key in config.parameters})
            raise ConfigurationError(
                f"setting {name!r} is not known{nearest_name_hint(parameter, known)}; known are {', '.join(known)}"
            )
        for config in having:
            config.parameters[parameter].string_value = str(value)


def _check(name: str, config: Any) -> None:
    """Find now what the model would find when it is loaded."""
    try:
        stage_or_chain = _READERS.get(name, StageConfig).from_parameters(_parameters(config))
        if isinstance(stage_or_chain, StageConfig):
            stage_or_chain.parallel(name)
    except ConfigurationError as error:
        raise ConfigurationError(f"model {name}: {error}") from error


def _parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def _make_room(destination: Path, models: list[str], *, force: bool) -> None:
    try:
        destination.mkdir(parents=True, exist_ok=True)
        marker = destination / _MARKER
        earlier = json.loads(marker.read_text(encoding="utf-8"))["models"] if marker.is_file() else None
        if earlier is None and any(destination.iterdir()) and not force:
            raise ConfigurationError(
                f"{destination} is not empty and was not made by triton-diffusion; choose another folder, "
                f"or pass --force to replace {', '.join(models)} in it"
            )
        for name in {*(earlier or ()), *models}:
            if (destination / name).is_dir():
                shutil.rmtree(destination / name)
    except OSError as error:
        raise ConfigurationError(f"{destination} cannot be written: {error}") from error
