"""A double of Triton's model repository and its control, as the real one (24.10) was seen to answer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

STAGES = ["text_encoding", "denoising", "decoding"]
MODELS = [
    *[*STAGES, "cancellation", "families", "diffusion_stream", "diffusion"],
    *[*(f"wan_{stage}" for stage in ["image_encoding", *STAGES]), "wan_cancellation", "wan_families"],
    *["wan_stream", "wan", "wander", "other"],
]


@dataclass(frozen=True)
class ControlError:
    grpc_status: str
    http_status: int
    message: str


@dataclass
class RepositoryDouble:
    """Models of the chains `diffusion` and `wan`, and of others that are none of ours."""

    is_explicit: bool = True
    failing: dict[str, str] = field(default_factory=dict)
    """Model: why it does not load."""
    states: dict[str, str] = field(default_factory=lambda: dict.fromkeys(MODELS, ""))
    unloading_s: float = 0.05
    """How long a model takes to go; the answer to the caller does not wait for it."""
    controlled: list[tuple[str, str, list[str]]] = field(default_factory=list)
    """(verb, model, the models that were there at that moment) of each call."""

    def index(self) -> list[dict[str, str]]:
        return [{"name": model, "state": state} if state else {"name": model} for model, state in self.states.items()]

    def loaded(self) -> list[str]:
        return [model for model, state in self.states.items() if state in ("READY", "UNLOADING")]

    def control(self, verb: str, model: str) -> ControlError | None:
        if not self.is_explicit:
            message = "explicit model load / unload is not allowed if polling is enabled"
            return ControlError("UNAVAILABLE", 503, message)
        self.controlled.append((verb, model, self.loaded()))
        if verb == "load":
            return self._load(model)
        self.states[model] = "UNLOADING"
        timer = threading.Timer(self.unloading_s, self.states.__setitem__, (model, "UNAVAILABLE"))
        timer.daemon = True
        timer.start()
        return None

    def _load(self, model: str) -> ControlError | None:
        reason = self.failing.get(model)
        self.states[model] = "READY" if reason is None else "UNAVAILABLE"
        if reason is None:
            return None
        message = f"load failed for model '{model}': version 1 is at UNAVAILABLE state: Internal: {reason}\n;\n"
        return ControlError("INVALID_ARGUMENT", 400, message)
