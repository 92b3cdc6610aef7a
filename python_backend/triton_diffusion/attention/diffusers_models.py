"""Make the attention of a stock diffusers model go through us: the one place where something of diffusers is replaced.

diffusers' models call `dispatch_attention_fn`, which looks up the backend that their attention processor names in a
registry, and hands it what the processor has as `_parallel_config`. We register one backend there, and give it to the
processors of our models alone, together with the function to call; other models in the process are not affected.
In cross attention some processors (Wan's) keep their `_parallel_config` to themselves, since no rank needs another for
it. So there is one more registered backend for each of ours, which needs nothing to be handed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from triton_diffusion.attention.backends import BACKENDS, AttentionBackend, AttentionInputs, attend, key_mask
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
    model: torch.nn.Module,
    make_attention: Callable[[], Attention],
    *,
    leave: Sequence[str] = (),
    cross: Sequence[str] = (),
    cross_backend: AttentionBackend = BACKENDS["torch_sdpa"],
) -> int:
    """Have every attention of `model` computed by a function of its own from `make_attention`; returns how many.

    leave: paths of modules whose attention stays as it is. cross: paths, with "*" for all modules of a list, of those
    that `cross_backend` computes alone, whoever shares the model.

    Raises:
        ConfigurationError: an attention processor of the model does not go through diffusers' dispatcher.
    """
    prefixes = tuple(f"{path}." for path in leave)
    given = getattr(model, "attn_processors", None) or _processors(model)
    processors = {name: processor for name, processor in given.items() if not name.startswith(prefixes)}
    if not processors:
        raise ConfigurationError(f"{type(model).__name__} has no attention processors that could be replaced")
    for name, processor in processors.items():
        if not hasattr(processor, "_attention_backend") or not hasattr(processor, "_parallel_config"):
            raise ConfigurationError(
                f"{type(model).__name__}: {name} is a {type(processor).__name__}, which does not go through diffusers' "
                "attention dispatcher; it needs a processor of its family's own"
            )
    for name, processor in processors.items():
        if any(fnmatchcase(name, f"{path}.*") for path in cross):
            processor._attention_backend = _ALONE[cross_backend.name]
        else:
            processor._attention_backend = _OURS
            processor._parallel_config = make_attention()
    return len(processors)


def _processors(model: torch.nn.Module) -> dict[str, Any]:
    """As `attn_processors`, of models that do not have it: GLM-Image, Z-Image."""
    modules = model.named_modules()
    return {f"{name}.processor": module.processor for name, module in modules if hasattr(module, "processor")}


def _make_name(value: str) -> AttentionBackendName:
    # A value of the enumeration that is not one of its members: the dispatcher takes it, and nobody else can name it.
    name = str.__new__(AttentionBackendName, value)
    name._name_, name._value_ = value.upper(), value
    return name


_OURS = _make_name("triton_diffusion")
_ALONE = {name: _make_name(f"triton_diffusion_{name}") for name in BACKENDS}


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
    _refuse(dropout_p, is_causal, enable_gqa)
    attention: Attention = _parallel_config
    return attention(query, key, value, attn_mask, scale)


def _register_alone(backend: AttentionBackend) -> None:
    @_AttentionBackendRegistry.register(_ALONE[backend.name])  # type: ignore[untyped-decorator]
    def _attend_alone(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        _refuse(dropout_p, is_causal, enable_gqa)
        mask = key_mask(attn_mask, key.shape[1], query.dtype)
        return attend(backend, AttentionInputs(query, key, value, mask, scale))[0]


for _backend in BACKENDS.values():
    _register_alone(_backend)


def _refuse(dropout_p: float, is_causal: bool, enable_gqa: bool) -> None:
    if dropout_p or is_causal or enable_gqa:
        raise ValueError(f"dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa} are not supported")
