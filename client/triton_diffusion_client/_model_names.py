"""What the models of one served checkpoint are called: every name comes from that of its chain."""

from __future__ import annotations

from collections.abc import Collection

DEFAULT_NAME = "diffusion"
_STAGES = ("prior_generation", "image_encoding", "text_encoding", "denoising", "decoding")


def stream_name(name: str) -> str:
    """The chain that sends progress and previews first."""
    return f"{name}_stream"


def helper_name(name: str, role: str) -> str:
    """A stage, or the model `cancellation`, `families` or `health`; beside the default chain they bear no prefix."""
    return role if name == DEFAULT_NAME else f"{name}_{role}"


def load_order(name: str) -> list[str]:
    """All models that a name can have: each before those that call it, the chain last."""
    helpers = [helper_name(name, role) for role in (*_STAGES, "cancellation", "families", "health")]
    return [*helpers, stream_name(name), name]


def chain_names(models: Collection[str]) -> list[str]:
    """The models among these that are chains: those with a denoising stage of their name."""
    return sorted(model for model in models if helper_name(model, "denoising") in models)
