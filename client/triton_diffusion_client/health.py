"""How a server is, as its model `health` tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StageHealth:
    """A stage of the served checkpoint."""

    ready: bool
    """Whether it takes requests."""
    ready_replicas: int
    num_replicas: int
    restarts_total: int
    """How often worker groups were started anew since the stage was loaded."""
    reason: str = ""
    """Why it is not ready, or not with all replicas."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """The answer of the model `health`."""

    ready: bool
    """Whether requests are served: every stage is ready."""
    stages: Mapping[str, StageHealth]


def parse_health(text: str | bytes) -> Health:
    """The server's JSON. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
    content = json.loads(text)
    return Health(
        ready=content["ready"] is True,
        stages={str(name): _parse_stage(stage) for name, stage in content["stages"].items()},
    )


def _parse_stage(content: Mapping[str, Any]) -> StageHealth:
    return StageHealth(
        ready=content["ready"] is True,
        ready_replicas=int(content.get("ready_replicas", 0)),
        num_replicas=int(content.get("num_replicas", 0)),
        restarts_total=int(content.get("restarts_total", 0)),
        reason=str(content.get("reason") or ""),
    )
