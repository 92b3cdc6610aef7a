"""The tokens that GLM-Image's autoregressive prior draws up a picture with, as GlmImagePipeline samples them.

transformers samples from torch's own random numbers, which the pipeline seeds with its (first) generator's seed. So a
request is drawn again in diffusers by `GlmImagePipeline(..., generator=torch.Generator().manual_seed(seed))`. All
outputs of a request have the prior of its first, as those of the pipeline's `num_images_per_prompt` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from triton_diffusion.errors import InvalidRequestError, StageError
from triton_diffusion.families.glm_image.family import PIXELS_PER_PRIOR_TOKEN, UPSAMPLING
from triton_diffusion.families.pictures import to_pil
from triton_diffusion.loading.components import Components
from triton_diffusion.request import GenerationRequest


def generate_prior(
    components: Components, request: GenerationRequest, images: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Sample the prior of one request.

    Returns prior_token_ids (1, S), a token for each of the transformer's image tokens, and the same of each picture:
    condition_token_ids_N (1, S_N).

    Raises:
        InvalidRequestError: the prior and the transformer would see a picture in different sizes.
        StageError: the prior ended early, or sampled what is no part of a picture.
    """
    model = components["vision_language_encoder"]
    inputs = _model_inputs(components, request, images)
    grids = inputs["image_grid_thw"]
    tokens = {}
    if images:
        _check_sizes(images, grids[: len(images)])
        features = model.get_image_features(inputs["pixel_values"], grids[: len(images)]).pooler_output
        for index, feature in enumerate(features):
            ids = model.get_image_tokens([feature])
            tokens[f"condition_token_ids_{index}"] = upsample(ids, *grids[index, 1:].tolist())
    # Without pictures, a small version comes first, whose grid is the second; both end with a token.
    target, first = (grids[-1], 0) if images else (grids[0], int(grids[1:].prod(-1).sum()))
    height, width = target[1:].tolist()
    num_tokens = first + height * width
    sampled = _sample(model, inputs, request.seed, num_tokens + 1)
    if len(sampled) <= num_tokens:
        raise StageError(f"the prior ended after {len(sampled) - 1} of {num_tokens} tokens; try another seed")
    drawn = sampled[first:num_tokens]
    _check_tokens(components, drawn)
    return tokens | {"prior_token_ids": upsample(drawn, height, width)}


def upsample(token_ids: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(height * width,) in rows to (1, 4 * height * width): each token becomes 2 x 2."""
    grid = token_ids.view(height, width).repeat_interleave(UPSAMPLING, 0).repeat_interleave(UPSAMPLING, 1)
    return grid.reshape(1, -1)


def _model_inputs(components: Components, request: GenerationRequest, images: Sequence[torch.Tensor]) -> Any:
    content: list[dict[str, Any]] = [{"type": "image", "image": to_pil(image)} for image in images]
    content.append({"type": "text", "text": request.prompt})
    try:
        return (
            components["processor"]
            .apply_chat_template(
                [[{"role": "user", "content": content}]],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": False, "target_h": request.height, "target_w": request.width},
            )
            .to(components.device)
        )
    except ValueError as error:
        if not images:
            raise
        raise InvalidRequestError(f"the prior cannot see these pictures: {error}") from error


def _sample(model: Any, inputs: Any, seed: int, num_tokens: int) -> torch.Tensor:
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        ids: torch.Tensor = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=True)
    return ids[0, inputs["input_ids"].shape[1] :]


def _check_sizes(images: Sequence[torch.Tensor], grids: torch.Tensor) -> None:
    """The transformer has a picture in its own size, the prior in one that it can see (smart_resize)."""
    pixels = PIXELS_PER_PRIOR_TOKEN // UPSAMPLING
    for index, (image, (_, height, width)) in enumerate(zip(images, grids.tolist(), strict=True)):
        own = (image.shape[0] // pixels, image.shape[1] // pixels)
        if own != (UPSAMPLING * height, UPSAMPLING * width):
            raise InvalidRequestError(
                f"picture {index} has {image.shape[0]} x {image.shape[1]} pixels, and the prior sees it as "
                f"{height * PIXELS_PER_PRIOR_TOKEN} x {width * PIXELS_PER_PRIOR_TOKEN} (height x width); "
                "resize it to that"
            )


def _check_tokens(components: Components, tokens: torch.Tensor) -> None:
    """On a GPU, an embedding that is asked for what it does not have ends the process."""
    codebook_size = components.checkpoint.setting("transformer", "prior_vq_quantizer_codebook_size")
    if strangers := sorted({token for token in tokens.tolist() if token >= codebook_size}):
        raise StageError(
            f"the prior sampled {strangers}, and pictures have tokens below {codebook_size}; try another seed"
        )
