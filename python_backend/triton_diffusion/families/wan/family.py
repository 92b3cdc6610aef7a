"""Wan as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

if TYPE_CHECKING:
    import torch

IMAGE_TO_VIDEO = "WanImageToVideoPipeline"
# What the Wan models were trained at; transformers with a CLIP count on exactly so many text tokens.
TEXT_LENGTH = 512
# The pipelines refuse other sizes, whatever the autoencoder.
_SIZE_MULTIPLE = 16
# Frames a second of the training videos; those of the TI2V model are denser.
_FPS, _TI2V_FPS = 16.0, 24.0


@dataclass(frozen=True)
class Traits:
    """In what the checkpoints of this family differ; all come from model_index.json and the transformer's config."""

    has_experts: bool
    """Two transformers, for high noise and for low noise (Wan 2.2 A14B)."""
    keeps_first_frame: bool
    """A given picture takes the place of the first frame, at timestep 0, instead of further channels (Wan 2.2 TI2V)."""
    has_clip: bool
    """Pictures also go through CLIP, and the transformer attends to them (Wan 2.1 image to video)."""
    min_images: int
    max_images: int


def traits(checkpoint: Checkpoint) -> Traits:
    """Read them; raises ConfigurationError for a combination that the pipelines do not have."""
    index = checkpoint.index
    from_image = checkpoint.pipeline_class == IMAGE_TO_VIDEO
    keeps_first_frame = bool(index.get("expand_timesteps"))
    has_experts = index.get("boundary_ratio") is not None
    config = checkpoint.config("transformer")
    # The embedding of positions over two pictures is that of checkpoints for a first and a last frame.
    needs_two = from_image and config.get("pos_embed_seq_len") is not None
    has_clip = from_image and config.get("image_dim") is not None
    if keeps_first_frame and (has_experts or has_clip):
        raise ConfigurationError(
            f"{checkpoint.path / 'model_index.json'} has expand_timesteps together with boundary_ratio, or with a "
            "transformer that has image_dim; no Wan model is like that, so it is not served: correct the files"
        )
    if keeps_first_frame:
        return Traits(has_experts, keeps_first_frame, has_clip, min_images=int(from_image), max_images=1)
    if not from_image:
        return Traits(has_experts, keeps_first_frame, has_clip, min_images=0, max_images=0)
    # A CLIP that embeds one picture cannot take a last frame.
    most = 2 if needs_two or not has_clip else 1
    return Traits(has_experts, keeps_first_frame, has_clip, min_images=2 if needs_two else 1, max_images=most)


def has_high_noise(timesteps: torch.Tensor, checkpoint: Checkpoint) -> list[bool]:
    """Of timesteps (n,), which of them the first transformer makes; all, where there is no second one."""
    boundary_ratio = checkpoint.index.get("boundary_ratio")
    if boundary_ratio is None:
        return [True] * len(timesteps)
    schedule = checkpoint.config("scheduler", "scheduler_config.json")
    is_high: list[bool] = (timesteps >= boundary_ratio * schedule.get("num_train_timesteps", 1000)).tolist()
    return is_high


def compression(checkpoint: Checkpoint) -> tuple[int, int]:
    """Frames a latent frame, and pixels along a side of a latent pixel; older autoencoders do not say it."""
    config = checkpoint.config("vae")
    return int(config.get("scale_factor_temporal") or 4), int(config.get("scale_factor_spatial") or 8)


def latent_size(request: GenerationRequest, checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Latent frames, rows and columns of one video."""
    temporal, spatial = compression(checkpoint)
    return (request.num_frames - 1) // temporal + 1, request.height // spatial, request.width // spatial


class WanFamily(ModelFamily):
    """Wan 2.1 and 2.2: text to video, image to video, first and last frame to video, and TI2V."""

    name = "wan"
    pipeline_classes = ("WanPipeline", IMAGE_TO_VIDEO)
    tasks = ("text-to-video", "image-to-video")
    denoisers = ("transformer", "transformer_2")
    makes_videos = True

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """UMT5; one transformer or two; what encodes pictures where the checkpoint takes any."""
        has = traits(checkpoint)
        stages: dict[str, tuple[str, ...]] = {
            "text_encoding": ("tokenizer", "text_encoder"),
            "denoising": ("scheduler", "transformer", *(("transformer_2",) if has.has_experts else ())),
            "decoding": ("vae",),
        }
        if has.max_images:
            stages["image_encoding"] = ("vae", *(("image_processor", "image_encoder") if has.has_clip else ()))
        return stages

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """Those of WanPipeline and WanImageToVideoPipeline; the shift is the checkpoint's own."""
        has = traits(checkpoint)
        temporal, spatial = compression(checkpoint)
        _, *patch = checkpoint.setting("transformer", "patch_size")
        schedule = checkpoint.config("scheduler", "scheduler_config.json")
        if schedule.get("use_dynamic_shifting"):
            raise ConfigurationError(
                f"{checkpoint.path}/scheduler has use_dynamic_shifting=true, for which the Wan pipelines have no "
                "shift; set it to false, and flow_shift to that of the checkpoint (3.0 for 480 rows, 5.0 for 720)"
            )
        shift = schedule.get("flow_shift", schedule.get("shift"))
        return RequestDefaults(
            height=480,
            width=832,
            size_multiple=math.lcm(_SIZE_MULTIPLE, *(spatial * side for side in patch)),
            num_inference_steps=50,
            guidance_scale=5.0,
            embedded_guidance_scale=None,
            max_sequence_length=TEXT_LENGTH,
            longest_sequence_length=TEXT_LENGTH,
            num_frames=81,
            frame_step=temporal,
            fps=_TI2V_FPS if has.keeps_first_frame else _FPS,
            flow_shift=None if shift is None else float(shift),
            min_images=has.min_images,
            max_images=has.max_images,
            has_guidance_scale_2=has.has_experts,
        )

    def guidance_scales(
        self, request: GenerationRequest, timesteps: torch.Tensor, checkpoint: Checkpoint
    ) -> list[float]:
        """Each transformer has its own."""
        high, low = request.guidance_scale, request.guidance_scale_2
        return [high if low is None or is_high else low for is_high in has_high_noise(timesteps, checkpoint)]

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Patches of latent frames, rows and columns."""
        patch = checkpoint.setting("transformer", "patch_size")
        sides = zip(latent_size(request, checkpoint), patch, strict=True)
        return math.prod(length // side for length, side in sides)

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """The text is not in the sequence: it is attended to from outside."""
        return self.num_image_tokens(request, checkpoint)

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads and feed-forward of the transformers, which are alike, or of UMT5."""
        component, names = ("transformer", ("num_attention_heads", "ffn_dim"))
        if stage_model == "text_encoding":
            component, names = ("text_encoder", ("num_heads", "d_ff"))
        return {name: int(checkpoint.setting(component, name)) for name in names}


FAMILY = WanFamily()
