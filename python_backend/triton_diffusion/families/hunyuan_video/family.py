"""HunyuanVideo as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.families.language_models import language_model_counts
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

# Tokens of the prompt template in front of the prompt ("crop_start" of HunyuanVideoPipeline's DEFAULT_PROMPT_TEMPLATE,
# whose module needs torch).
TEMPLATE_TOKENS = 95
# Frames a second of the videos that the model was trained on; the pipeline leaves this to the caller.
FPS = 24.0


def latent_size(checkpoint: Checkpoint, request: GenerationRequest) -> tuple[int, int, int]:
    """Frames, height and width of the latents; the first frame has a latent of its own (causal in time)."""
    ratio = int(checkpoint.setting("vae", "spatial_compression_ratio"))
    frames = (request.num_frames - 1) // int(checkpoint.setting("vae", "temporal_compression_ratio")) + 1
    return frames, request.height // ratio, request.width // ratio


class HunyuanVideoFamily(ModelFamily):
    """HunyuanVideo, FastHunyuan and checkpoints trained from them."""

    name = "hunyuan_video"
    pipeline_classes = ("HunyuanVideoPipeline",)
    tasks = ("text-to-video",)
    makes_videos = True

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """LLaMA and CLIP; one transformer."""
        return {
            "text_encoding": ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
            "denoising": ("scheduler", "transformer"),
            "decoding": ("vae",),
        }

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """HunyuanVideoPipeline's own defaults; the shift is that of the checkpoint's schedule."""
        schedule = checkpoint.config("scheduler", "scheduler_config.json")
        if schedule.get("use_dynamic_shifting"):
            raise ConfigurationError(
                f"{checkpoint.path}/scheduler has use_dynamic_shifting=true, for which HunyuanVideoPipeline has no "
                "shift; set it to false, and shift to that of the checkpoint (7.0 for HunyuanVideo)"
            )
        longest = int(checkpoint.setting("text_encoder", "max_position_embeddings")) - TEMPLATE_TOKENS
        guidance_distilled = bool(checkpoint.setting("transformer", "guidance_embeds"))
        return RequestDefaults(
            height=720,
            width=1280,
            size_multiple=int(checkpoint.setting("vae", "spatial_compression_ratio"))
            * int(checkpoint.setting("transformer", "patch_size")),
            num_inference_steps=50,
            guidance_scale=1.0,
            embedded_guidance_scale=6.0 if guidance_distilled else None,
            max_sequence_length=min(256, longest),
            longest_sequence_length=longest,
            num_frames=129,
            frame_step=int(checkpoint.setting("vae", "temporal_compression_ratio")),
            fps=FPS,
            flow_shift=float(schedule.get("shift", 1.0)),
        )

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Patches of the latents."""
        frames, height, width = latent_size(checkpoint, request)
        size = int(checkpoint.setting("transformer", "patch_size"))
        depth = int(checkpoint.setting("transformer", "patch_size_t"))
        return (frames // depth) * (height // size) * (width // size)

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads of the transformer; heads and feed-forward of LLaMA (CLIP is small and stays whole)."""
        if stage_model == "denoising":
            return {"num_attention_heads": checkpoint.setting("transformer", "num_attention_heads")}
        return language_model_counts(checkpoint, "text_encoder")


FAMILY = HunyuanVideoFamily()
