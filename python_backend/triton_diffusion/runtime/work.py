"""How much work a request is for a stage model: read by the scheduler and by the ranks, so that both count alike."""

from __future__ import annotations

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest

STAGE_MODELS = ("text_encoding", "denoising", "decoding")


def rows_and_steps(stage_model: str, request: GenerationRequest) -> tuple[int, int]:
    """(rows, steps a row): denoising has a row a picture and many steps, the other stages do a request in one go."""
    if stage_model == "denoising":
        return request.num_outputs, request.num_inference_steps
    return 1, 1


def tokens_per_row(stage_model: str, family: ModelFamily, checkpoint: Checkpoint, request: GenerationRequest) -> int:
    """What one row adds to a batch: the length of its sequences, those of the unconditional prediction too."""
    if stage_model == "decoding":
        return request.num_outputs * family.num_image_tokens(request, checkpoint)
    sequences = 2 if request.uses_guidance else 1
    if stage_model == "text_encoding":
        return sequences * request.max_sequence_length
    return sequences * family.num_tokens(request, checkpoint)
