"""How much work a request is for a stage model: read by the scheduler and by the ranks, so that both count alike."""

from __future__ import annotations

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest

STAGE_MODELS = ("prior_generation", "image_encoding", "text_encoding", "denoising", "decoding")
"""In the order in which a request goes through them; a checkpoint may need fewer (ModelFamily.stage_components)."""


def rows_and_steps(
    stage_model: str, family: ModelFamily, checkpoint: Checkpoint, request: GenerationRequest
) -> tuple[int, int]:
    """(rows, steps a row): denoising has a row an output and many steps, the other stages do a request in one go."""
    if stage_model == "denoising":
        return request.num_outputs, family.num_steps(request, checkpoint)
    return 1, 1


def tokens_per_row(stage_model: str, family: ModelFamily, checkpoint: Checkpoint, request: GenerationRequest) -> int:
    """What one row adds to a batch: the length of its sequences, those of the unconditional prediction too."""
    sequences = 2 if family.uses_guidance(request, checkpoint) else 1
    match stage_model:
        case "denoising":
            return sequences * family.num_tokens(request, checkpoint)
        case "text_encoding":
            return sequences * request.max_sequence_length
        case "image_encoding":
            return max(1, request.num_images) * family.num_image_tokens(request, checkpoint)
        case _:
            return request.num_outputs * family.num_image_tokens(request, checkpoint)
