"""Make the attention of a stock diffusers model go through us: the one place where something of diffusers is replaced.

diffusers' models call `dispatch_attention_fn`, which looks up the backend that their attention processor names in a
registry, and hands it what the processor has as `_parallel_config`. We register one backend there, and give it to the
processors of our models alone, together with the function to call; other models in the process are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from triton_diffusion.errors import ConfigurationError


class Attention(Protocol):
    """What computes the attention of one module."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Query (B, Sq, H, D), key and value (B, Sk, H, D), mask over the keys; returns (B, Sq, H, D)."""


def replace_attention(
    model: torch.nn.Module, make_attention: Callable[[], Attention], *, leave: Sequence[str] = ()
) -> int:
    """Have every attention of `model` computed by a function of its own from `make_attention`; returns how many.

    leave: paths of modules whose attention stays as it is.

    Raises:
        ConfigurationError: an attention processor of the model does not go through diffusers' dispatcher.
    """
    prefixes = tuple(f"{path}." for path in leave)
    given = getattr(model, "attn_processors", None) or {}
    processors = {name: processor for name, processor in given.items() if not name.startswith(prefixes)}
    if not processors:
        raise ConfigurationError(f"{type(model).__name__} has no attention processors that could be replaced")
    for name, processor in processors.items():
        if not hasattr(processor, "_attention_backend") or not hasattr(processor, "_parallel_config"):
            raise ConfigurationError(
                f"{type(model).__name__}: {name} is a {type(processor).__name__}, which does not go through diffusers' "
                "attention dispatcher; it needs a processor of its family's own"
            )
    for processor in processors.values():
        processor._attention_backend = _OURS
        processor._parallel_config = make_attention()
    return len(processors)


def _make_name() -> AttentionBackendName:
    # A value of the enumeration that is not one of its members: the dispatcher takes it, and nobody else can name it.
    name = str.__new__(AttentionBackendName, "triton_diffusion")
    name._name_, name._value_ = "TRITON_DIFFUSION", "triton_diffusion"
    return name


_OURS = _make_name()


@_AttentionBackendRegistry.register(_OURS, supports_context_parallel=True)  # type: ignore[untyped-decorator]
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    if dropout_p or is_causal or enable_gqa:
        raise ValueError(f"dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa} are not supported")
    attention: Attention = _parallel_config
    return attention(query, key, value, attn_mask, scale)
