"""What every model family provides: one torch-free description and four modules of plain functions.

families/<name>/__init__.py   FAMILY: the description, readable without torch
families/<name>/encode.py     encode_prompts(...), cache_key(...)
families/<name>/denoise.py    prepare_schedule(...), prepare_latents(...), shared_inputs(...), predict(...)
families/<name>/decode.py     decode(...)
families/<name>/parallelize.py  tensor_plans(...), sequence_plan(...)

denoise.py and decode.py also have example_inputs(...), for warm-up.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from triton_diffusion.config import ParallelConfig
from triton_diffusion.errors import ConfigurationError
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

if TYPE_CHECKING:
    import torch

    from triton_diffusion.distributed.sequence import SequencePlan
    from triton_diffusion.distributed.tensor_parallel import TensorPlan
    from triton_diffusion.loading.components import Components


class ModelFamily(ABC):
    """What the Triton processes know of a family; no method here imports torch."""

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    """The diffusers pipelines, as model_index.json names them, whose checkpoints this family serves."""
    stage_components: ClassVar[Mapping[str, tuple[str, ...]]]
    """For each stage model, the components it loads."""

    @abstractmethod
    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """What a request gets that leaves a value open, read from the checkpoint's configuration files."""

    @abstractmethod
    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Tokens that one picture is to the transformer."""

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Length of the transformer's sequence for one row: the unit of its cost."""
        return request.max_sequence_length + self.num_image_tokens(request, checkpoint)

    def batch_key(self, stage: str, request: GenerationRequest) -> str:
        """Rows of equal key may share a forward pass of `stage`."""
        if stage == "text_encoding":
            return f"{request.max_sequence_length}"
        if stage == "decoding":
            return f"{request.height}x{request.width}"
        return f"{request.height}x{request.width}+{request.max_sequence_length}"

    has_true_guidance: ClassVar[bool] = True
    """Whether requests can have an unconditional prediction beside the conditional one (CFG)."""

    @abstractmethod
    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """By their names in the configuration: numbers that tp_size must divide, attention heads first; empty where
        the stage's models cannot be divided.
        """

    def check_parallel(self, stage_model: str, checkpoint: Checkpoint, parallel: ParallelConfig) -> None:
        """Raise ConfigurationError, with the degrees that work, if the checkpoint cannot be shared like this."""
        if stage_model == "decoding":
            return
        numbers = self.head_counts(stage_model, checkpoint)
        if not numbers and parallel.tp * parallel.sequence > 1:
            raise ConfigurationError(
                f"{parallel}: {stage_model} of {checkpoint.pipeline_class} has no tensor or sequence parallelism; "
                "use dp_size or enable_cfg_parallel for more GPUs"
            )
        check_degree("tp_size", parallel.tp, numbers)
        if parallel.ulysses > 1:
            heads, count = next(iter(numbers.items()))
            each = f"{heads} / tp_size" if parallel.tp > 1 else heads
            try:
                check_degree("ulysses_degree", parallel.ulysses, {each: count // parallel.tp})
            except ConfigurationError as error:
                raise ConfigurationError(f"{error}; or ring_degree, which needs no heads") from None

    @property
    def encode(self) -> EncodeModule:
        """families/<name>/encode.py."""
        return cast(EncodeModule, self._module("encode"))

    @property
    def denoise(self) -> DenoiseModule:
        """families/<name>/denoise.py."""
        return cast(DenoiseModule, self._module("denoise"))

    @property
    def decode(self) -> DecodeModule:
        """families/<name>/decode.py."""
        return cast(DecodeModule, self._module("decode"))

    @property
    def parallelize(self) -> ParallelizeModule:
        """families/<name>/parallelize.py."""
        return cast(ParallelizeModule, self._module("parallelize"))

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"triton_diffusion.families.{self.name}.{name}")


def check_degree(name: str, degree: int, numbers: Mapping[str, int]) -> None:
    """Raise ConfigurationError, with the degrees that work, unless `degree` divides every number."""
    wrong = [f"{what}={number}" for what, number in numbers.items() if number % degree]
    if wrong:
        highest = min(numbers.values())
        working = [str(d) for d in range(1, highest + 1) if all(number % d == 0 for number in numbers.values())]
        raise ConfigurationError(f"{name}={degree} does not divide {' and '.join(wrong)}; use {', '.join(working)}")


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as the transformer takes it.

    conditioning: tensors by name, each (1, ...): for FLUX prompt_embeds (1, L, D) and pooled_prompt_embeds (1, P).
    warning: what the caller should know, such as a prompt that was cut.
    """

    conditioning: dict[str, torch.Tensor]
    warning: str | None = None


class EncodeModule(Protocol):
    """families/<name>/encode.py."""

    def encode_prompts(
        self, components: Components, prompts: Sequence[str], max_sequence_length: int
    ) -> list[EncodedPrompt]:
        """Encode a batch of prompts; the ranks that run the stage call it together."""

    def cache_key(self, components: Components, prompt: str, max_sequence_length: int) -> Hashable:
        """Equal for prompts with the same outcome of `encode_prompts`: the tokens that each encoder is given."""


class DenoiseModule(Protocol):
    """families/<name>/denoise.py."""

    def prepare_schedule(self, components: Components, request: GenerationRequest) -> Any:
        """A diffusers scheduler set to its first step; one a row, since each keeps its position inside."""

    def prepare_latents(self, components: Components, request: GenerationRequest) -> torch.Tensor:
        """Noise (num_outputs, S, C), each row from its own seed."""

    def shared_inputs(self, components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
        """Arguments of the transformer that are equal for all rows of a batch_key, such as position ids."""

    def example_inputs(self, components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
        """What the text encoding leaves for a request without guidance, all zeros."""

    def predict(
        self,
        components: Components,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """One forward pass of the transformer, every row at its own timestep.

        latents: (B, S, C). timesteps: (B,) float32. conditioning: each (B, ...), among them
        embedded_guidance_scale (B,) float32.
        Returns the prediction (B, S, C).
        """


class DecodeModule(Protocol):
    """families/<name>/decode.py."""

    def example_inputs(self, components: Components, request: GenerationRequest) -> dict[str, torch.Tensor]:
        """What the denoising leaves for a request, all zeros."""

    def decode(self, components: Components, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
        """Pictures of a batch of latents (B, S, C): uint8 (B, H, W, 3) on the CPU."""


class ParallelizeModule(Protocol):
    """families/<name>/parallelize.py."""

    def tensor_plans(self, checkpoint: Checkpoint) -> Mapping[str, TensorPlan]:
        """How tensor parallelism divides each component that it divides."""

    def sequence_plan(self, transformer: Any) -> SequencePlan:
        """Where the transformer's sequence is cut and put together."""
