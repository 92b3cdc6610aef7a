"""PriorGenerationStage: what an autoregressive model draws up before the diffusion fills it in."""

from __future__ import annotations

from collections.abc import Sequence

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.components import Components
from triton_diffusion.stages.base import StageParallelism, StageRequest, TickStage
from triton_diffusion.stages.image_encoding import require_images

_SHARED = (
    "all {} outputs have the prior of the first, as in the diffusers pipeline; drawn again alone with its seed, "
    "any other has a prior of its own, and is another picture"
)


class PriorGenerationStage(TickStage[StageRequest]):
    """Samples the prior of each request of a batch.

    Sampled tokens must be the same on every rank, and the last bit of a probability can change one: rank 0 alone
    samples, and sends the others what came out.
    """

    name = "prior_generation"
    parallelism = StageParallelism.MAIN_RANK_ONLY_AND_SEND_TO_OTHERS

    def __init__(self, family: ModelFamily, components: Components) -> None:
        self._prior = family.prior
        self._components = components

    def items(self, request: StageRequest, row: int) -> StageRequest:
        """A request is one row here."""
        return request

    def verify_input(self, item: StageRequest) -> None:
        """The pictures that the request counts are there."""
        require_images(item)

    def forward(self, batch: Sequence[StageRequest]) -> None:
        """Leave the samples in the outputs."""
        for item in batch:
            item.outputs.update(self._prior.generate_prior(self._components, item.request, item.images))
            num_outputs = item.request.num_outputs
            # The seeds that come with the outputs are otherwise enough to draw each of them again alone.
            item.warnings = [] if num_outputs == 1 else [_SHARED.format(num_outputs)]

    def verify_output(self, item: StageRequest) -> None:
        """All of it is finite."""
        item.require_outputs(*item.outputs)
