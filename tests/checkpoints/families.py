"""A tiny checkpoint of every family, and a request that it draws quickly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.flux import build_flux_checkpoint
from checkpoints.flux2 import build_klein_checkpoint
from checkpoints.glm_image import build_glm_image_checkpoint
from checkpoints.hunyuan_video import build_hunyuan_image_to_video_checkpoint, build_hunyuan_video_checkpoint
from checkpoints.ltx_video import build_ltx_condition_checkpoint, build_ltx_video_checkpoint
from checkpoints.qwen_image import build_qwen_image_checkpoint
from checkpoints.stable_diffusion import build_stable_diffusion_checkpoint, build_stable_diffusion_xl_checkpoint
from checkpoints.stable_diffusion_3 import build_stable_diffusion_3_checkpoint
from checkpoints.wan import build_wan_checkpoint
from checkpoints.z_image import build_z_image_checkpoint


@dataclass(frozen=True)
class FamilyCase:
    """A checkpoint of a family and what is asked of it: options of a request beside SMALL."""

    build: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)
    num_images: int = 0


SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 24, "seed": 5}
_GUIDED = {"guidance_scale": 3.0, "negative_prompt": "dark"}
_VIDEO = {"num_frames": 5}
CASES = {
    "flux": FamilyCase(
        lambda folder: build_flux_checkpoint(folder, guidance_embeds=True, dynamic_shift=True),
        {"strength": 0.8, "num_inference_steps": 4},
        num_images=1,
    ),
    "flux2": FamilyCase(build_klein_checkpoint, {"max_sequence_length": 64}),
    "glm_image": FamilyCase(build_glm_image_checkpoint, _GUIDED),
    "hunyuan_video": FamilyCase(build_hunyuan_video_checkpoint, _VIDEO),
    "ltx_video": FamilyCase(build_ltx_video_checkpoint, _VIDEO | _GUIDED),
    "qwen_image": FamilyCase(build_qwen_image_checkpoint, _GUIDED),
    "stable_diffusion": FamilyCase(build_stable_diffusion_checkpoint, {"max_sequence_length": 20} | _GUIDED),
    "stable_diffusion_3": FamilyCase(build_stable_diffusion_3_checkpoint, _GUIDED),
    "stable_diffusion_xl": FamilyCase(build_stable_diffusion_xl_checkpoint, {"max_sequence_length": 20} | _GUIDED),
    "wan": FamilyCase(
        lambda folder: build_wan_checkpoint(folder, "experts"), _VIDEO | _GUIDED | {"guidance_scale_2": 2.0}
    ),
    "z_image": FamilyCase(build_z_image_checkpoint, _GUIDED),
}
QWEN_EDIT = FamilyCase(
    lambda folder: build_qwen_image_checkpoint(folder, "QwenImageEditPipeline", halvings=2), _GUIDED, num_images=1
)
"""A picture in the prompt. The pipeline makes a megapixel of it, whatever its size, which takes its time."""
LTX_CONDITION = FamilyCase(build_ltx_condition_checkpoint, _VIDEO | _GUIDED, num_images=1)
"""Noise on the first frame in every step, which the noise scheduler of the row draws."""
HUNYUAN_FROM_PICTURE = FamilyCase(
    lambda folder: build_hunyuan_image_to_video_checkpoint(folder, "token_replace"), {"num_frames": 9}, num_images=1
)
"""A picture in the prompt and as the first frame."""
