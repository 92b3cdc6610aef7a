"""FluxPipeline with a clock at its seams; imports torch, so it belongs in the pipeline's own process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.picture import PictureRequest
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.runtime.rank import choose_dtype


def load_pipeline(model_path: str, dtype: str, num_threads: int) -> Any:
    """The FluxPipeline of a checkpoint on the GPU, if there is one, and quiet; `dtype` as in StageConfig."""
    torch.set_num_threads(num_threads)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute_dtype = choose_dtype(dtype, device)
    pipeline = diffusers.FluxPipeline.from_pretrained(open_checkpoint(model_path).path, dtype=compute_dtype)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class TimedPipeline:
    """Draws pictures and tells where the time went. On a GPU only the whole is exact: work is queued there."""

    def __init__(self, model_path: str, dtype: str, num_threads: int) -> None:
        self._pipeline = load_pipeline(model_path, dtype, num_threads)
        self.dtype = str(self._pipeline.dtype).removeprefix("torch.")
        self._seams: dict[str, float] = {}
        self._pipeline.encode_prompt = self._noting(self._pipeline.encode_prompt, after="encoded")
        self._pipeline.vae.decode = self._noting(self._pipeline.vae.decode, before="denoised")
        self._pipeline.transformer.register_forward_pre_hook(self._note_first_step)

    def generate(
        self, request: PictureRequest, *, latents: bool = False
    ) -> tuple[float, dict[str, float], NDArray[Any]]:
        """(latency in seconds, its parts, pixels or latents) of one call."""
        self._seams.clear()
        generator = torch.Generator().manual_seed(request.seed)
        started = _now()
        made = self._pipeline(
            **request.pipeline_arguments(), generator=generator, output_type="latent" if latents else "pil"
        ).images[0]
        ended = _now()
        array = made.float().cpu().numpy() if latents else np.asarray(made)
        return ended - started, self._parts(started, ended), array

    def generate_batch(self, requests: Sequence[PictureRequest]) -> float:
        """Seconds that one call takes for pictures that differ in nothing but prompt and seed."""
        arguments = requests[0].pipeline_arguments() | {"prompt": [request.prompt for request in requests]}
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        started = _now()
        self._pipeline(**arguments, generator=generators, output_type="pil")
        return _now() - started

    def _parts(self, started: float, ended: float) -> dict[str, float]:
        encoded, first_step = self._seams["encoded"], self._seams["first step"]
        denoised = self._seams.get("denoised", ended)
        return {
            "text encoding": encoded - started,
            "denoising": denoised - encoded,
            "denoising, its steps": denoised - first_step,
            "decoding": ended - denoised,
        }

    def _note_first_step(self, *_: Any) -> None:
        self._seams.setdefault("first step", _now())

    def _noting(self, function: Callable[..., Any], *, before: str = "", after: str = "") -> Callable[..., Any]:
        """`function`, noting the time at which it is called or at which it returns."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if before:
                self._seams[before] = _now()
            result = function(*args, **kwargs)
            if after:
                self._seams[after] = _now()
            return result

        return call


def _now() -> float:
    return time.perf_counter()
