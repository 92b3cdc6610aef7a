"""LTX-Video as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
CONDITION_PIPELINE = "LTXConditionPipeline"
# Where sigmas are to be the timesteps that the pipeline makes, the noise scheduler must not move them.
_PLAIN_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


def takes_conditions(checkpoint: Checkpoint) -> bool:
    """Whether it is one of 0.9.5 or later, with a schedule and positions in time of its own (LTXConditionPipeline)."""
    return checkpoint.pipeline_class == CONDITION_PIPELINE


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
    """LTX-Video, and checkpoints trained from it; a picture that is given becomes the first frame.

    Of LTXConditionPipeline (0.9.5 and later), that is a condition at frame 0, of strength 1.
    """

    name = "ltx_video"
    pipeline_classes = ("LTXPipeline", "LTXImageToVideoPipeline", CONDITION_PIPELINE)
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
        """Those of the pipelines, which have the same, but for the length of a prompt."""
        sizes = [checkpoint.setting("transformer", name) for name in ("patch_size", "patch_size_t")]
        if sizes != [1, 1]:
            raise ConfigurationError(
                f"{checkpoint.path}/transformer has patch_size={sizes[0]} and patch_size_t={sizes[1]}; "
                f"{checkpoint.pipeline_class} works with 1 and 1, one token a latent"
            )
        schedule = checkpoint.config("scheduler", "scheduler_config.json")
        has_conditions = takes_conditions(checkpoint)
        if has_conditions:
            _require_plain_schedule(checkpoint)
        # A schedule that is made without the shift, or one that grows with the number of tokens, leaves nothing to set.
        has_shift = not (has_conditions or schedule.get("use_dynamic_shifting"))
        temporal, spatial = compression(checkpoint)
        return RequestDefaults(
            height=512,
            width=704,
            size_multiple=spatial,
            num_inference_steps=50,
            guidance_scale=3.0,
            embedded_guidance_scale=None,
            max_sequence_length=256 if has_conditions else 128,
            longest_sequence_length=LONGEST_SEQUENCE_LENGTH,
            num_frames=161,
            frame_step=temporal,
            fps=FRAME_RATE,
            flow_shift=float(schedule.get("shift", 1.0)) if has_shift else None,
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


def _require_plain_schedule(checkpoint: Checkpoint) -> None:
    """Raise ConfigurationError where LTXConditionPipeline would fail, or step past the timesteps that it makes."""
    _, noise_scheduler = checkpoint.component_class("scheduler")
    if noise_scheduler != "FlowMatchEulerDiscreteScheduler":
        raise ConfigurationError(
            f"{checkpoint.path}/scheduler is a {noise_scheduler}; {CONDITION_PIPELINE} works with a "
            "FlowMatchEulerDiscreteScheduler: use that of the published checkpoint"
        )
    config = checkpoint.config("scheduler", "scheduler_config.json")
    wrong = {name: config[name] for name, plain in _PLAIN_SCHEDULE.items() if config.get(name, plain) != plain}
    if wrong:
        raise ConfigurationError(
            f"{checkpoint.path}/scheduler has {', '.join(f'{name}={value}' for name, value in wrong.items())}; "
            f"{CONDITION_PIPELINE} makes its schedule by itself: set "
            f"{', '.join(f'{name}={_PLAIN_SCHEDULE[name]}' for name in wrong)}"
        )


FAMILY = LtxVideoFamily()
