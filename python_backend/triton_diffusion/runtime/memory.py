"""Out of memory: how it is told from other errors, and what a caller is told of it."""

from __future__ import annotations

import torch

from triton_diffusion.errors import ResourceExhaustedError
from triton_diffusion.request import GenerationRequest

# Libraries under torch, and its allocator on the CPU, say it in errors of no class of their own.
_PHRASES = ("out of memory", "can't allocate memory", "_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def too_large(
    stage_model: str, request: GenerationRequest, tokens: int, device: torch.device
) -> ResourceExhaustedError:
    """The error of a request of which a single row does not fit."""
    size = f"{request.height}x{request.width}"
    frames = f"x{request.num_frames} frames" if request.num_frames > 1 else ""
    fewer = ", fewer frames" if frames else ""
    return ResourceExhaustedError(
        f"{size}{frames} (height x width, {tokens} tokens) does not fit in the memory of {device.type} in "
        f"{stage_model}, though it ran alone; ask for a smaller picture{fewer} or a shorter prompt, or have the "
        "operator share the model among more GPUs"
    )
