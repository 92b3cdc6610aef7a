"""HunyuanVideo as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from triton_diffusion.errors import ConfigurationError
from triton_diffusion.families.base import ModelFamily
from triton_diffusion.families.language_models import language_model_counts
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

# Tokens of the prompt template in front of the prompt ("crop_start" of HunyuanVideoPipeline's DEFAULT_PROMPT_TEMPLATE,
# whose module needs torch).
TEMPLATE_TOKENS = 95
IMAGE_TO_VIDEO = "HunyuanVideoImageToVideoPipeline"
# The same of that pipeline, whose template has a place for the picture; LLaVA then puts so many tokens there.
PICTURE_TEMPLATE_TOKENS, PICTURE_TOKENS = 103, 576
# Of the picture's tokens the transformer is given every second, or fewer.
PICTURE_TOKENS_KEPT = PICTURE_TOKENS // 2
# The pipeline does not return the first frames of a video whose picture is further channels.
FRAMES_LEFT_OUT = 4
# What transformers does not write of LLaVA's language model, since LlamaConfig has it anyway.
_LLAMA_DEFAULTS = {
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "hidden_size": 4096,
    "max_position_embeddings": 2048,
}
# Frames a second of the videos that the model was trained on; the pipeline leaves this to the caller.
FPS = 24.0


ImageCondition = Literal["latent_concat", "token_replace"]
"""How the transformer is told of the picture: as further channels of its input (the first checkpoint, of 33 channels),
or as the first frame of its input, which stays as it is (the second)."""


def image_condition(checkpoint: Checkpoint) -> ImageCondition | None:
    """None where the checkpoint makes videos of text alone.

    Raises:
        ConfigurationError: the checkpoint is for pictures, and its transformer takes none.
    """
    if checkpoint.pipeline_class != IMAGE_TO_VIDEO:
        return None
    given: Any = checkpoint.config("transformer").get("image_condition_type")
    if given not in get_args(ImageCondition):
        raise ConfigurationError(
            f"{checkpoint.path}/transformer has image_condition_type={given!r}; {IMAGE_TO_VIDEO} needs one of "
            f"{', '.join(get_args(ImageCondition))}: take the transformer of an image-to-video checkpoint"
        )
    condition: ImageCondition = given
    return condition


def latent_size(checkpoint: Checkpoint, request: GenerationRequest) -> tuple[int, int, int]:
    """Frames, height and width of the latents; the first frame has a latent of its own (causal in time)."""
    ratio = int(checkpoint.setting("vae", "spatial_compression_ratio"))
    frames = (request.num_frames - 1) // int(checkpoint.setting("vae", "temporal_compression_ratio")) + 1
    return frames, request.height // ratio, request.width // ratio


class HunyuanVideoFamily(ModelFamily):
    """HunyuanVideo, HunyuanVideo-I2V, FastHunyuan and checkpoints trained from them."""

    name = "hunyuan_video"
    pipeline_classes = ("HunyuanVideoPipeline", IMAGE_TO_VIDEO)
    tasks = ("text-to-video", "image-to-video")
    text_encoder_sees_images = True
    makes_videos = True

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """LLaMA, or LLaVA where there is a picture, and CLIP; one transformer."""
        encoders: tuple[str, ...] = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
        stages: dict[str, tuple[str, ...]] = {"denoising": ("scheduler", "transformer"), "decoding": ("vae",)}
        if image_condition(checkpoint):
            return {"image_encoding": ("vae",), "text_encoding": (*encoders, "image_processor"), **stages}
        return {"text_encoding": encoders, **stages}

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """HunyuanVideoPipeline's own defaults; the shift is that of the checkpoint's schedule.

        HunyuanVideoImageToVideoPipeline's are the same, but for the embedded guidance scale, for which it has 1.0 and
        its documentation the 6.0 that the model was published with.
        """
        schedule = checkpoint.config("scheduler", "scheduler_config.json")
        if schedule.get("use_dynamic_shifting"):
            raise ConfigurationError(
                f"{checkpoint.path}/scheduler has use_dynamic_shifting=true, for which {checkpoint.pipeline_class} has "
                "no shift; set it to false, and shift to that of the checkpoint (7.0 for HunyuanVideo)"
            )
        num_images = int(image_condition(checkpoint) is not None)
        if num_images:
            text_config = _LLAMA_DEFAULTS | checkpoint.setting("text_encoder", "text_config")
            longest = int(text_config["max_position_embeddings"]) - PICTURE_TEMPLATE_TOKENS - PICTURE_TOKENS + 1
        else:
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
            min_images=num_images,
            max_images=num_images,
        )

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Patches of the latents."""
        frames, height, width = latent_size(checkpoint, request)
        size = int(checkpoint.setting("transformer", "patch_size"))
        depth = int(checkpoint.setting("transformer", "patch_size_t"))
        return (frames // depth) * (height // size) * (width // size)

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """The prompt has the picture in front."""
        seen = PICTURE_TOKENS_KEPT if image_condition(checkpoint) else 0
        return seen + super().num_tokens(request, checkpoint)

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads of the transformer; heads and feed-forward of LLaMA, and of what LLaVA sees pictures by (CLIP is small
        and stays whole).
        """
        if stage_model == "denoising":
            return {"num_attention_heads": checkpoint.setting("transformer", "num_attention_heads")}
        counts = language_model_counts(checkpoint, "text_encoder", _LLAMA_DEFAULTS)
        vision = checkpoint.config("text_encoder").get("vision_config", {})
        names = ("num_attention_heads", "intermediate_size")
        return counts | {f"vision_config.{name}": int(vision[name]) for name in names if name in vision}


FAMILY = HunyuanVideoFamily()
