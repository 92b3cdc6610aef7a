"""The attention backends: one function each, all with the same arguments and results."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class AttentionInputs:
    """What attention is computed of.

    query: (B, Sq, H, D). key, value: (B, Sk, H, D), in the same dtype; strides are free, but for the last dimension.
    mask: None, or additive over the keys, (B, 1, 1, Sk) in the query's dtype. scale: None for 1 / sqrt(D).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None

    @property
    def heads_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as torch's kernels take them, (B, H, S, D)."""
        return self.query.transpose(1, 2), self.key.transpose(1, 2), self.value.transpose(1, 2)


Attended = tuple[torch.Tensor, torch.Tensor | None]
"""Output (B, Sq, H, D), and log-sum-exp (B, Sq, H) float32, None unless asked for: the natural logarithm of the
softmax's denominator, by which attention over parts of the keys is merged (Milakov and Gimelshein 2018,
arXiv:1805.02867).
"""


class Attend(Protocol):
    """The function of a backend."""

    def __call__(self, inputs: AttentionInputs, *, with_lse: bool) -> Attended:
        """Attend."""


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """One way to compute attention, and what it needs."""

    name: str
    attend: Attend
    takes_mask: bool
    gives_lse: bool
    """Without the log-sum-exp there is no ring: parts of the keys cannot be merged."""
    needs_cuda: bool = True
    half_only: bool = True
    """Computes in bfloat16 and float16 only."""
    max_head_dim: int = 256
    packages: tuple[tuple[str, str], ...] = ()
    """(module to import, what to install for it); one of them is enough."""

    def missing(self) -> str | None:
        """What has to be installed, or None."""
        if not self.packages or any(_is_installed(module) for module, _ in self.packages):
            return None
        return " or ".join(f"`pip install {package}`" for _, package in self.packages)


def _torch_sdpa(inputs: AttentionInputs, *, with_lse: bool) -> Attended:
    q, k, v = inputs.heads_first
    if not with_lse:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask, scale=inputs.scale).transpose(1, 2), None
    # F.scaled_dot_product_attention keeps the log-sum-exp to itself; the kernels under it do not.
    if inputs.query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=inputs.mask, scale=inputs.scale
        )
    elif inputs.mask is None and q.dtype != torch.float32 and q.shape[-1] % 8 == 0:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=inputs.scale)[:2]
    else:
        bias = None if inputs.mask is None else _aligned_bias(inputs.mask, q.shape[1], q.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=inputs.scale)[:2]
        # This kernel pads the queries.
        lse = lse[:, :, : q.shape[2]]
    return out.transpose(1, 2), lse.transpose(1, 2).float()


def _cudnn(inputs: AttentionInputs, *, with_lse: bool) -> Attended:
    q, k, v = inputs.heads_first
    bias = None if inputs.mask is None else inputs.mask.expand(q.shape[0], q.shape[1], q.shape[2], -1)
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, with_lse, scale=inputs.scale)[:2]
    if not with_lse:
        return out.transpose(1, 2), None
    # (B, H, Sq) or, in newer versions, (B, H, Sq, 1).
    return out.transpose(1, 2), lse.reshape(out.shape[:3]).transpose(1, 2).float()


_FLASH_ATTN_MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}


def _flash_attn(inputs: AttentionInputs, *, with_lse: bool) -> Attended:
    assert inputs.mask is None
    version = flash_attn_version(inputs.query.device)
    assert version is not None
    flash_attn = _function(_FLASH_ATTN_MODULES[version], "flash_attn_func")
    ask = _lse_arguments(flash_attn) if with_lse else {}
    result = flash_attn(inputs.query, inputs.key, inputs.value, softmax_scale=inputs.scale, **ask)
    return _attended(result, with_lse=with_lse, library="flash-attn")


@functools.cache
def _lse_arguments(flash_attn: Any) -> dict[str, bool]:
    """What asks for the log-sum-exp: version 2 and 3 have return_attn_probs and version 4 return_lse, while those of
    version 3 until August 2025 give it unasked (Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py,
    hopper/flash_attn_interface.py, flash_attn/cute/interface.py).
    """
    known = inspect.signature(flash_attn).parameters
    return {name: True for name in ("return_attn_probs", "return_lse") if name in known}


def flash_attn_version(device: torch.device) -> int | None:
    """The newest FlashAttention that is installed and made for this GPU: 4 (Blackwell), 3 (Hopper) or 2; else None."""
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if capability >= 10 and _is_installed("flash_attn.cute"):
        return 4
    if capability == 9 and _is_installed("flash_attn_interface"):
        return 3
    return 2 if capability >= 8 and _is_installed("flash_attn.flash_attn_interface") else None


def _sage_attn(inputs: AttentionInputs, *, with_lse: bool) -> Attended:
    assert inputs.mask is None
    sage = _function("sageattention", "sageattn")
    result = sage(
        inputs.query, inputs.key, inputs.value, tensor_layout="NHD", sm_scale=inputs.scale, return_lse=with_lse
    )
    # Version 1 takes any argument and gives no log-sum-exp.
    return _attended(result, with_lse=with_lse, library="sageattention")


def _attended(result: Any, *, with_lse: bool, library: str) -> Attended:
    """Of what FlashAttention and SageAttention return: an output (B, Sq, H, D), or a tuple of that, a log-sum-exp
    (B, H, Sq) to the natural base, or None, and perhaps more.
    """
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    if not with_lse:
        return out, None
    if lse is None:
        raise RuntimeError(
            f"this version of {library} gives no log-sum-exp, by which a ring merges parts; install a newer one, or "
            "use ulysses_degree instead of ring_degree"
        )
    return out, lse.transpose(1, 2).float()


def _flex(inputs: AttentionInputs, *, with_lse: bool) -> Attended:
    from torch.nn.attention.flex_attention import AuxRequest

    mask = inputs.mask

    def add_mask(
        score: torch.Tensor, row: torch.Tensor, _: torch.Tensor, __: torch.Tensor, key_at: torch.Tensor
    ) -> torch.Tensor:
        assert mask is not None
        return score + mask[row, 0, 0, key_at]

    q, k, v = inputs.heads_first
    out, aux = _flex_kernel(inputs.query.device)(
        q, k, v, score_mod=None if mask is None else add_mask, scale=inputs.scale, return_aux=AuxRequest(lse=with_lse)
    )
    return out.transpose(1, 2), aux.lse.transpose(1, 2).float() if with_lse else None


@functools.cache
def _flex_kernel(device: torch.device) -> Any:
    """Compiled for a GPU; on the CPU as it is, slow, since a compiler may be missing."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device.type == "cpu" else torch.compile(flex_attention)


BACKENDS = {
    backend.name: backend
    for backend in (
        AttentionBackend(
            name="torch_sdpa",
            attend=_torch_sdpa,
            takes_mask=True,
            gives_lse=True,
            needs_cuda=False,
            half_only=False,
            max_head_dim=4096,
        ),
        AttentionBackend(name="cudnn", attend=_cudnn, takes_mask=True, gives_lse=True),
        AttentionBackend(
            name="flash_attn",
            attend=_flash_attn,
            takes_mask=False,
            gives_lse=True,
            packages=(
                ("flash_attn", "flash-attn --no-build-isolation"),
                ("flash_attn_interface", "flash-attn-3"),
                ("flash_attn.cute", "flash-attn-4"),
            ),
        ),
        AttentionBackend(
            name="sage_attn",
            attend=_sage_attn,
            takes_mask=False,
            gives_lse=True,
            max_head_dim=128,
            packages=(("sageattention", "sageattention"),),
        ),
        AttentionBackend(name="flex", attend=_flex, takes_mask=True, gives_lse=True, needs_cuda=False, half_only=False),
    )
}


def attend(backend: AttentionBackend, inputs: AttentionInputs, *, with_lse: bool = False) -> Attended:
    """Attend by `backend`, or by torch_sdpa where there is a mask that it does not take."""
    if inputs.mask is not None and not backend.takes_mask:
        backend = BACKENDS["torch_sdpa"]
    return backend.attend(inputs, with_lse=with_lse)


def key_mask(mask: torch.Tensor | None, num_keys: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as backends take it, additive (B, 1, 1, Sk), from the forms that diffusers models use.

    mask: boolean (True: look at the key) or additive, (B, Sk) or (B, 1, 1, Sk).

    What is masked gets half of the lowest number rather than minus infinity: the softmax over a part of the keys of
    which none counts then still is a number, and its share in the whole is zero.

    Raises:
        ValueError: another shape; a mask that is not the same for all queries cannot be split with the sequence.
    """
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    if mask.ndim != 4 or mask.shape[1:] != (1, 1, num_keys):
        raise ValueError(f"an attention mask of shape {list(mask.shape)} is not one over {num_keys} keys")
    lowest = torch.finfo(dtype).min / 2
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask.to(dtype).clamp(min=lowest)


def _aligned_bias(mask: torch.Tensor, heads: int, queries: int) -> torch.Tensor:
    """(B, H, Sq, Sk) without a copy a head; the rows that the kernel reads must start at multiples of 16 bytes."""
    keys = mask.shape[-1]
    padded = F.pad(mask, (0, -keys % 8))
    return padded.expand(-1, heads, queries, -1)[..., :keys]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
