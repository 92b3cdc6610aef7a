"""How much work a request is for a stage model: read by the scheduler and by the ranks, so that both count alike."""

from __future__ import annotations

from triton_diffusion.request import GenerationRequest

STAGE_MODELS = ("text_encoding", "denoising", "decoding")


def rows_and_steps(stage_model: str, request: GenerationRequest) -> tuple[int, int]:
    """(rows, steps a row): denoising has a row a picture and many steps, the other stages do a request in one go."""
    if stage_model == "denoising":
        return request.num_outputs, request.num_inference_steps
    return 1, 1
