"""LTX-Video as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults
from triton_diffusion.state import TensorInfo

if TYPE_CHECKING:
    import torch

# The pipeline sets no limit; the model was trained on prompts of 128 and, later, 256 tokens.
LONGEST_SEQUENCE_LENGTH = 512
FRAME_RATE = 25.0


def compression(checkpoint: Checkpoint) -> tuple[int, int]:
    """(frames, pixels along a side) that a latent stands for; as AutoencoderKLLTXVideo works them out."""
    config = checkpoint.config("vae")
    halvings = 2 ** sum(checkpoint.setting("vae", "spatio_temporal_scaling"))
    temporal = config.get("temporal_compression_ratio") or config.get("patch_size_t", 1) * halvings
    spatial = config.get("spatial_compression_ratio") or config.get("patch_size", 4) * halvings
    return int(temporal), int(spatial)


def latent_size(checkpoint: Checkpoint, request: GenerationRequest) -> tuple[int, int, int]:
    """Frames, height and width of the latents; the first frame has a latent of its own."""
    temporal, spatial = compression(checkpoint)
    return (request.num_frames - 1) // temporal + 1, request.height // spatial, request.width // spatial


class LtxVideoFamily(ModelFamily):
    """LTX-Video up to 0.9.1, and checkpoints trained from it; a picture that is given becomes the first frame."""

    name = "ltx_video"
    pipeline_classes = ("LTXPipeline", "LTXImageToVideoPipeline")
    tasks = ("text-to-video", "image-to-video")
    makes_videos = True

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """T5; one transformer; the autoencoder at both ends."""
        return {
            "image_encoding": ("vae",),
            "text_encoding": ("tokenizer", "text_encoder"),
            "denoising": ("scheduler", "transformer"),
            "decoding": ("vae",),
        }

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """LTXPipeline's own defaults, which are LTXImageToVideoPipeline's."""
        sizes = [checkpoint.setting("transformer", name) for name in ("patch_size", "patch_size_t")]
        if sizes != [1, 1]:
            raise ConfigurationError(
                f"{checkpoint.path}/transformer has patch_size={sizes[0]} and patch_size_t={sizes[1]}; "
                f"{checkpoint.pipeline_class} works with 1 and 1, one token a latent"
            )
        schedule = checkpoint.config("scheduler", "scheduler_config.json")
        temporal, spatial = compression(checkpoint)
        return RequestDefaults(
            height=512,
            width=704,
            size_multiple=spatial,
            num_inference_steps=50,
            guidance_scale=3.0,
            embedded_guidance_scale=None,
            max_sequence_length=128,
            longest_sequence_length=LONGEST_SEQUENCE_LENGTH,
            num_frames=161,
            frame_step=temporal,
            fps=FRAME_RATE,
            # A shift that grows with the number of tokens leaves nothing to set.
            flow_shift=None if schedule.get("use_dynamic_shifting") else float(schedule.get("shift", 1.0)),
            min_images=int(checkpoint.pipeline_class == "LTXImageToVideoPipeline"),
            max_images=1,
        )

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """One a latent."""
        frames, height, width = latent_size(checkpoint, request)
        return frames * height * width

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """The text is attended to, and is no part of the sequence."""
        return self.num_image_tokens(request, checkpoint)

    def batch_key(self, stage: str, request: GenerationRequest, tensors: Mapping[str, TensorInfo]) -> str:
        """Positions in time are in seconds, so that rows of one batch have one frame rate."""
        key = super().batch_key(stage, request, tensors)
        return f"{key}@{request.fps:g}" if stage == "denoising" else key

    def preview_latents(self, latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
        """The first frame, or the last where the first is the picture that was given."""
        return latents[:, :, -1:] if request.num_images else super().preview_latents(latents, request)

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads of the transformer; heads and feed-forward of T5."""
        if stage_model == "denoising":
            return {"num_attention_heads": checkpoint.setting("transformer", "num_attention_heads")}
        return {name: checkpoint.setting("text_encoder", name) for name in ("num_heads", "d_ff")}


FAMILY = LtxVideoFamily()
