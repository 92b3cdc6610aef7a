"""What a served checkpoint takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What may be asked for under one name."""

    default: Any = None
    """None: there is none, or the server finds one for each request, as for the seed."""
    min: float | None = None
    max: float | None = None
    choices: tuple[Any, ...] = ()
    """The only values allowed; empty where that is not so."""
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint that the server has loaded, and its parameters by the names of the server's input tensors."""

    family: str
    """The kind of model, such as "flux"."""
    pipeline_class: str
    """The diffusers pipeline of the checkpoint."""
    tasks: tuple[str, ...]
    """Such as "text-to-image"."""
    parameters: Mapping[str, Parameter]


def parse_families(text: str | bytes) -> tuple[Family, ...]:
    """The server's JSON. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
    return tuple(
        Family(
            family=str(entry["family"]),
            pipeline_class=str(entry["pipeline_class"]),
            tasks=tuple(str(task) for task in entry["tasks"]),
            parameters={str(name): _parse_parameter(content) for name, content in entry["parameters"].items()},
        )
        for entry in json.loads(text)
    )


def _parse_parameter(content: Mapping[str, Any]) -> Parameter:
    return Parameter(
        default=content.get("default"),
        min=content.get("min"),
        max=content.get("max"),
        choices=tuple(content.get("choices") or ()),
        description=str(content.get("description") or ""),
    )
