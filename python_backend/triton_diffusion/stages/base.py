"""PipelineStage: one modular step of the pipeline, with a contract on what it takes and leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from triton_diffusion.errors import StageError
from triton_diffusion.request import GenerationRequest
from triton_diffusion.state import image_name

if TYPE_CHECKING:
    import torch

    from triton_diffusion.families.base import Schedule

Item = TypeVar("Item")


class StageParallelism(Enum):
    """Which ranks of a worker group run a stage."""

    REPLICATED = "replicated"
    """Every rank runs it; what is sharded is sharded inside the model."""
    MAIN_RANK_ONLY = "main_rank_only"
    """Rank 0 runs it, the others wait for its outcome."""
    MAIN_RANK_ONLY_AND_SEND_TO_OTHERS = "main_rank_only_and_send_to_others"
    """Rank 0 runs it and its outputs are broadcast: for results that must agree to the bit, such as sampled tokens."""
    CFG_PARALLEL = "cfg_parallel"
    """Conditional and unconditional predictions on different ranks of the cfg axis; where that is 1, as REPLICATED."""


@dataclass
class DenoiseRow:
    """One picture or video in the making.

    latents: (1, ...). conditioning: the transformer's arguments, each (1, ...). The position in the schedule lives in
    `noise_scheduler`, which belongs to this row alone, as does the `generator` for noise schedulers that add noise.
    """

    key: str
    """For messages: request and number of the row."""
    latents: torch.Tensor
    noise_scheduler: Any
    timesteps: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    negative_conditioning: dict[str, torch.Tensor] | None
    shared: dict[str, torch.Tensor]
    guidance_scales: list[float]
    """Of each step."""
    preview_interval: int
    generator: torch.Generator
    step: int = 0
    prediction: torch.Tensor | None = None
    preview: torch.Tensor | None = None
    """Estimate of the clean latents (1, ...) at a step that wants a preview."""
    initial_noise_state: dict[str, Any] = field(init=False)
    """The attributes of `noise_scheduler` at the first step."""

    def __post_init__(self) -> None:
        self.initial_noise_state = dict(vars(self.noise_scheduler))


@dataclass
class Conditioning:
    """What steers the denoising of one request; each tensor (1, ...), or (num_outputs, ...)."""

    positive: dict[str, torch.Tensor]
    negative: dict[str, torch.Tensor] | None


@dataclass
class StageRequest:
    """A request as the ranks of a stage hold it: inputs from the stage before, outputs for the stage behind."""

    request_id: str
    request: GenerationRequest
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    conditioning: Conditioning | None = None
    schedules: list[Schedule] = field(default_factory=list)
    rows: list[DenoiseRow] = field(default_factory=list)

    @property
    def images(self) -> tuple[torch.Tensor, ...]:
        """The caller's pictures, uint8 (H, W, 3) each."""
        return tuple(self.inputs[image_name(index)] for index in range(self.request.num_images))

    def require_inputs(self, *names: str) -> None:
        """Raise StageError for an input that the stage before did not leave."""
        for name in names:
            if name not in self.inputs:
                raise StageError(f"tensor {name!r} is missing; the state has {sorted(self.inputs) or 'no tensors'}")

    def require_outputs(self, *names: str) -> None:
        """Raise StageError for an output that is missing or not finite."""
        for name in names:
            if name not in self.outputs:
                raise StageError(f"the stage left no tensor {name!r}")
            require_finite(name, self.outputs[name])


class PipelineStage(ABC, Generic[Item]):
    """One stage. Calling it checks the contract on every item of the batch before and behind `forward`."""

    name: ClassVar[str]
    parallelism: ClassVar[StageParallelism] = StageParallelism.REPLICATED

    def __call__(self, batch: Sequence[Item]) -> None:
        """Run the stage on items that may share a forward pass."""
        for item in batch:
            self.verify_input(item)
        self.forward(batch)
        for item in batch:
            self.verify_output(item)

    def verify_input(self, item: Item) -> None:
        """Raise a DiffusionError if the item lacks what the stage needs."""

    @abstractmethod
    def forward(self, batch: Sequence[Item]) -> None:
        """Do the work, and leave the result in the items."""

    def verify_output(self, item: Item) -> None:
        """Raise a DiffusionError if the result is not what the next stage needs."""


class TickStage(PipelineStage[Item]):
    """The stage that a tick of the scheduler runs, between those that prepare a request and the end of its work.

    `forward` may fail on one rank and is then given up on all, so it must leave no trace but results that a second run
    overwrites; `commit` comes when all ranks have agreed that it succeeded.
    """

    @abstractmethod
    def items(self, request: StageRequest, row: int) -> Item:
        """The item that is row `row` of a request."""

    def num_steps(self, request: StageRequest) -> list[int]:
        """How many ticks each row of a request takes."""
        return [1]

    def steps_done(self, request: StageRequest) -> list[int]:
        """How many of them each row is through."""
        return [0]

    def commit(self, batch: Sequence[Item]) -> None:
        """Make the results of `forward` count."""

    def collect(self, request: StageRequest) -> None:
        """Rank 0 alone: make the request's outputs, once all its rows are through."""

    def checkpoint(self, request: StageRequest) -> Callable[[], bytes] | None:
        """Rank 0 alone: copy how far a request is; what is returned makes a blob of the copy, once, at any later time.

        None: this stage has no steps to go on from.
        """
        return None

    def resume(self, request: StageRequest, checkpoint: bytes) -> None:
        """Put a request that has been prepared where it was at a checkpoint; raises StageError."""
        raise StageError(f"{self.name} has no checkpoints")

    def need_less_memory(self, item: Item) -> bool:
        """A forward pass of this item alone ran out of memory: find a way that takes less of it, for the next one.

        False: there is none.
        """
        return False

    def limit_batch(self, max_batch_tokens: int) -> None:
        """Take note of what a forward pass may hold at most, where one item can be more than that."""

    def take_counts(self) -> dict[str, int]:
        """What was counted since the last call, by the name of a field of StageMetrics."""
        return {}

    def forget(self) -> None:
        """Drop what is kept from one batch to the next, behind the warm-up."""

    def preview(self, request: StageRequest) -> dict[str, torch.Tensor] | None:
        """Rank 0 alone: what the decoding stage needs to show the request as it stands, if this step wants that."""
        return None


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise StageError if a floating-point tensor has a NaN or an infinity."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise StageError(f"tensor {name!r} is not finite (NaN or infinity); lower the guidance or use dtype float32")
