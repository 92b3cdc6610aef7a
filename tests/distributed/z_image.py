"""What a rank does in the tests of Z-Image's layouts."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from triton_diffusion.distributed.group import RankGroup
from triton_diffusion.runtime.stage_loading import load_stage

Array = NDArray[np.float32]


def predict(group: RankGroup, folder: str, size: tuple[int, int], text_lengths: list[int]) -> Array:
    """Predictions of a batch; size: (height, width) in tokens. text_lengths: of each row."""
    stage = load_stage("denoising", folder, group, dtype=torch.float32, attention_backend="torch_sdpa")
    config = stage.components["transformer"].config
    random = torch.Generator().manual_seed(0)
    batch, longest = len(text_lengths), max(text_lengths)
    mask = torch.arange(longest)[None] < torch.tensor(text_lengths)[:, None]
    conditioning = {"prompt_embeds": torch.randn(batch, longest, config.cap_feat_dim, generator=random)}
    if not mask.all():
        conditioning["prompt_embeds_mask"] = mask
    noise = torch.randn(batch, config.in_channels, 2 * size[0], 2 * size[1], generator=random)
    timesteps = torch.linspace(900, 100, batch)
    prediction: Array = stage.family.denoise.predict(stage.components, noise, timesteps, conditioning, {}).numpy()
    return prediction
