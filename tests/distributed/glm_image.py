"""What a rank does in the tests of GLM-Image's layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.runtime.stage_loading import load_stage

Array = NDArray[np.float32]


def predict(
    group: RankGroup, folder: str, size: tuple[int, int], text_lengths: list[int], pictures: list[tuple[int, int]]
) -> Array:
    """Predictions of a batch, made twice in a row: once with condition pictures, once without.

    size, pictures: (height, width) in tokens. text_lengths: of each row; the second half of the rows is unconditional.
    """
    stage = load_stage("denoising", folder, group, dtype=torch.float32, attention_backend="torch_sdpa")
    config = stage.components["transformer"].config
    random = torch.Generator().manual_seed(0)
    batch, longest = len(text_lengths), max(text_lengths)

    def latents(height: int, width: int) -> torch.Tensor:
        patch = config.patch_size
        return torch.randn(batch, config.in_channels, height * patch, width * patch, generator=random)

    def tokens(height: int, width: int) -> torch.Tensor:
        return torch.randint(config.prior_vq_quantizer_codebook_size, (batch, height * width), generator=random)

    mask = torch.arange(longest)[None] < torch.tensor(text_lengths)[:, None]
    conditioning: dict[str, torch.Tensor] = {
        "prompt_embeds": torch.randn(batch, longest, config.text_embed_dim, generator=random) * mask[..., None],
        "prior_token_ids": tokens(*size),
        "prior_token_drop": (torch.arange(batch) >= batch // 2)[:, None],
    }
    if not mask.all():
        conditioning["prompt_embeds_mask"] = mask
    conditions: dict[str, Any] = {}
    for index, picture in enumerate(pictures):
        conditions[f"condition_latents_{index}"] = latents(*picture)
        conditions[f"condition_token_ids_{index}"] = tokens(*picture)
    noise, timesteps = latents(*size), torch.linspace(900, 100, batch)
    shared = {"target_size": torch.tensor([[16.0 * side for side in size]])}
    predictions = [
        stage.family.denoise.predict(stage.components, noise, timesteps, given, shared)
        for given in (conditioning | conditions, conditioning)
    ]
    return torch.stack(predictions).numpy()
