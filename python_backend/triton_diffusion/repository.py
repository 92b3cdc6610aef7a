"""Build a model repository for a checkpoint: a copy of model_repository/ with parameters set in its
config.pbtxt files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from triton_diffusion.config import CancellationConfig, ChainConfig, FamiliesConfig, HealthConfig, StageConfig
from triton_diffusion.errors import ConfigurationError, nearest_name_hint
from triton_diffusion.runtime.work import STAGE_MODELS

# Written beside the models, so that a later build knows which folders it may replace.
_MARKER = ".triton-diffusion.json"
# Which class reads the parameters of a model; the others are stages.
_READERS: Mapping[str, type[ChainConfig | CancellationConfig | FamiliesConfig | HealthConfig]] = {
    "diffusion": ChainConfig,
    "diffusion_stream": ChainConfig,
    "cancellation": CancellationConfig,
    "families": FamiliesConfig,
    "health": HealthConfig,
}
DEFAULT_NAME = "diffusion"
# Triton refuses a response cache for a decoupled model.
_CACHED_MODEL = "diffusion"


def find_model_repository() -> Path:
    """The folder model_repository/ of the installed package, or of the checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "model_repository", package.parent.parent / "model_repository"):
        if folder.is_dir():
            return folder
    raise ConfigurationError(f"model_repository/ is not beside {package}; install triton-diffusion anew")


def model_name(model: str, name: str) -> str:
    """What a model of model_repository/ is called for a checkpoint that is served as `name`.

    The chain has the name itself, so that requests go to "wan" (and "wan_stream"); the others have it in front, as in
    "wan_denoising". Under the name "diffusion" all are called as in model_repository/.
    """
    if name == DEFAULT_NAME:
        return model
    return name + model.removeprefix("diffusion") if model.startswith("diffusion") else f"{name}_{model}"


def build_repository(
    destination: str | Path,
    settings: Mapping[str, str],
    *,
    name: str = DEFAULT_NAME,
    stages: Collection[str] = STAGE_MODELS,
    force: bool = False,
    response_cache: bool = False,
) -> Path:
    """Write a model repository to `destination` and return its path.

    Models of another `name` that an earlier call wrote there stay, so that one server serves several checkpoints.
    `stages` are the stage models to write; the chain knows that there are no others.

    `settings` maps the name of a parameter to its value. A plain name (`dtype`) sets it in every model that
    has it, a name with a model (`denoising.dtype`) in that model only, and goes before the plain one.

    With `response_cache`, Triton answers a request to `diffusion` from its response cache if it has answered an equal
    one before; the server must be started with such a cache.

    Raises ConfigurationError for a name or a value that no model knows, and for a folder with content that an
    earlier call did not write; `force` then replaces the models of the same names and leaves the rest.
    """
    destination = Path(destination)
    source = find_model_repository()
    _check_name(name)
    configs = {path.parent.name: _read(path) for path in sorted(source.glob("*/config.pbtxt"))}
    _set_parameters(configs, settings)
    _name_stages(configs, name, stages)
    for model, config in configs.items():
        _check(model, config)
    if response_cache:
        configs[_CACHED_MODEL].response_cache.enable = True

    names = {model: model_name(model, name) for model in configs}
    written = _make_room(destination, name, list(names.values()), force=force)
    for model, config in configs.items():
        config.name = names[model]
        folder = destination / names[model]
        shutil.copytree(source / model, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    written[name] = list(names.values())
    (destination / _MARKER).write_text(json.dumps({"models": written}), encoding="utf-8")
    return destination


def read_stage_configs(folder: Path, name: str = DEFAULT_NAME) -> dict[str, StageConfig]:
    """The configuration of every stage model of a name in a repository; raises ConfigurationError."""
    paths = {stage: folder / model_name(stage, name) / "config.pbtxt" for stage in STAGE_MODELS}
    configs = {stage: _read(path) for stage, path in paths.items() if path.is_file()}
    return {stage: StageConfig.from_parameters(_parameters(config)) for stage, config in configs.items()}


def is_built(folder: Path) -> bool:
    """Whether `build_repository` wrote this folder."""
    return (folder / _MARKER).is_file()


def _read(path: Path) -> Any:
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ConfigurationError(f"{path} is not a model configuration: {error}") from error


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigurationError(f"name={name!r} must be letters, digits, '.', '_' and '-', as in \"wan-2.1\"")
    others = {other for other in (*STAGE_MODELS, *_READERS) if other != DEFAULT_NAME}
    if name in others:
        raise ConfigurationError(f"name={name!r} is that of a model of its own; choose another name")


def _name_stages(configs: dict[str, Any], name: str, stages: Collection[str]) -> None:
    """Leave out the stage models that are not in `stages`, and tell the others what the stages are called."""
    for stage in STAGE_MODELS:
        if stage not in stages:
            del configs[stage]
        for config in configs.values():
            if (key := f"{stage}_model") in config.parameters:
                config.parameters[key].string_value = model_name(stage, name) if stage in stages else ""


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


def _make_room(destination: Path, name: str, models: list[str], *, force: bool) -> dict[str, list[str]]:
    """Remove what is written anew; returns the models of other names that are there."""
    try:
        destination.mkdir(parents=True, exist_ok=True)
        marker = destination / _MARKER
        earlier: dict[str, list[str]] = {}
        if marker.is_file():
            written = json.loads(marker.read_text(encoding="utf-8"))["models"]
            # A list is of a version that knew one name only.
            earlier = {DEFAULT_NAME: written} if isinstance(written, list) else written
        elif any(destination.iterdir()) and not force:
            raise ConfigurationError(
                f"{destination} is not empty and was not made by triton-diffusion; choose another folder, "
                f"or pass --force to replace {', '.join(models)} in it"
            )
        taken = {model: other for other, names in earlier.items() if other != name for model in names}
        if clashing := sorted(set(models) & set(taken)):
            raise ConfigurationError(
                f"name={name!r}: {', '.join(clashing)} in {destination} belongs to {taken[clashing[0]]!r}; "
                "choose another name"
            )
        for model in {*earlier.pop(name, ()), *models}:
            if (destination / model).is_dir():
                shutil.rmtree(destination / model)
        return earlier
    except OSError as error:
        raise ConfigurationError(f"{destination} cannot be written: {error}") from error
