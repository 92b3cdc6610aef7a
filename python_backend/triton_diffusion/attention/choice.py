"""Which attention backend a model uses, and why."""

from __future__ import annotations

import os

import torch

from triton_diffusion.attention.backends import BACKENDS, AttentionBackend, flash_attn_version
from triton_diffusion.errors import ConfigurationError, nearest_name_hint

# thu-ml/SageAttention, sageattention/core.py: it raises for others, among them 10.0, Blackwell of data centers.
_SAGE_GPUS = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))

ENVIRONMENT_VARIABLE = "TRITON_DIFFUSION_ATTENTION_BACKEND"


def choose_backend(
    name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int, ring_degree: int = 1
) -> tuple[AttentionBackend, str]:
    """The backend and the reason for it.

    name: of a backend, or "auto": then the environment variable decides, then device, dtype and head size.

    Raises:
        ConfigurationError: there is no such backend, it is not installed, or does not run this model on this device.
    """
    reason = f"attention_backend={name}"
    if name == "auto" and (given := os.environ.get(ENVIRONMENT_VARIABLE, "auto")) != "auto":
        name, reason = given, f"{ENVIRONMENT_VARIABLE}={given}"
    if name == "auto":
        return _choose(device, dtype, head_dim)
    if name not in BACKENDS:
        raise ConfigurationError(
            f"{reason} is not known{nearest_name_hint(name, BACKENDS)}; use auto, {', '.join(BACKENDS)}"
        )
    backend = BACKENDS[name]
    if (problem := _problem(backend, device, dtype, head_dim)) is not None:
        raise ConfigurationError(f"{reason} {problem}")
    if ring_degree > 1 and not backend.gives_lse:
        able = ", ".join(other.name for other in BACKENDS.values() if other.gives_lse)
        raise ConfigurationError(
            f"{reason} gives no log-sum-exp, by which ring_degree={ring_degree} merges its parts; use one of {able}, "
            "or ulysses_degree instead of ring_degree"
        )
    return backend, reason


def _choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[AttentionBackend, str]:
    if device.type != "cuda":
        return BACKENDS["torch_sdpa"], f"the device is {device.type}"
    # In order of their speed on long sequences.
    reasons: list[str] = []
    for name in ("flash_attn", "cudnn"):
        problem = _problem(BACKENDS[name], device, dtype, head_dim)
        if problem is None:
            version = f" {flash_attn_version(device)}" if name == "flash_attn" else ""
            better = f", and {'; '.join(reasons)}" if reasons else ""
            return BACKENDS[name], f"{name}{version} runs {dtype} with heads of {head_dim} on this GPU{better}"
        reasons.append(f"{name} {problem}")
    return BACKENDS["torch_sdpa"], "; ".join(reasons)


def _problem(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps `backend` from running here, as the end of a sentence."""
    if (missing := backend.missing()) is not None:
        return f"is not installed: {missing}"
    if backend.needs_cuda and device.type != "cuda":
        return f"needs a GPU, and the device is {device.type}; use torch_sdpa"
    if backend.half_only and dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 and float16, and the model is in {str(dtype).removeprefix('torch.')}"
    if head_dim > backend.max_head_dim or (backend.needs_cuda and head_dim % 8):
        return f"takes heads of at most {backend.max_head_dim} in multiples of 8, and the model's have {head_dim}"
    if backend.name == "flash_attn":
        version = flash_attn_version(device)
        if version is None:
            return "is installed in no version for this GPU"
        if version == 4 and 128 < head_dim < 256:
            return f"4 takes heads of at most 128, or of 256, and the model's have {head_dim}"
    if backend.name == "sage_attn" and (capability := torch.cuda.get_device_capability(device)) not in _SAGE_GPUS:
        return f"has no kernel for GPUs of compute capability {capability[0]}.{capability[1]}"
    if backend.name == "cudnn" and not torch.backends.cudnn.is_available():
        return "is not part of this torch"
    return None
