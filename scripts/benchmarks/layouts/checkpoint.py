"""A FLUX checkpoint with a transformer of a chosen size and random weights, made from the demo checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from triton_diffusion.loading.checkpoint import DEMO_CHECKPOINT


def build_checkpoint(
    folder: Path, *, num_heads: int, head_dim: int, num_layers: int, num_single_layers: int, seed: int = 0
) -> Path:
    """Write the checkpoint to `folder`, which must not exist, and return it."""
    shutil.copytree(DEMO_CHECKPOINT, folder, ignore=shutil.ignore_patterns("transformer"))
    demo = json.loads((DEMO_CHECKPOINT / "transformer" / "config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer: Any = FluxTransformer2DModel(
            in_channels=demo["in_channels"],
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=head_dim,
            num_attention_heads=num_heads,
            joint_attention_dim=demo["joint_attention_dim"],
            pooled_projection_dim=demo["pooled_projection_dim"],
            guidance_embeds=True,
            axes_dims_rope=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
        )
        # Freshly made, it hardly listens to prompt and timestep; mistakes there must show in the latents.
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 2:
                gain = 0.3 if name == "proj_out.weight" else 1.0
                torch.nn.init.normal_(parameter, std=gain / parameter.shape[1] ** 0.5)
    transformer.save_pretrained(folder / "transformer")
    return folder
