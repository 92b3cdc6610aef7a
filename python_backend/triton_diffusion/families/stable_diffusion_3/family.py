"""Stable Diffusion 3 as the Triton processes know it, from the checkpoint's configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

# diffusers' StableDiffusion3Pipeline refuses more T5 tokens than this.
LONGEST_SEQUENCE_LENGTH = 512


def pixels_per_latent(checkpoint: Checkpoint) -> int:
    """Pixels along one side of the square that one latent pixel stands for."""
    halvings = len(checkpoint.setting("vae", "block_out_channels")) - 1
    size: int = 2**halvings
    return size


def pixels_per_token(checkpoint: Checkpoint) -> int:
    """Pixels along one side of the square that one token stands for."""
    return pixels_per_latent(checkpoint) * int(checkpoint.setting("transformer", "patch_size"))


def largest_side(checkpoint: Checkpoint) -> int:
    """Pixels: the transformer has learnt a position for so many tokens along a side, and no more."""
    return pixels_per_token(checkpoint) * int(checkpoint.setting("transformer", "pos_embed_max_size"))


def has_t5(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint comes with T5, which Stable Diffusion 3 can do without."""
    return None not in (checkpoint.index.get("text_encoder_3") or [None])


class StableDiffusion3Family(ModelFamily):
    """Stable Diffusion 3 medium, 3.5 medium and large, and checkpoints trained from them."""

    name = "stable_diffusion_3"
    pipeline_classes = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    tasks = ("text-to-image", "image-to-image")
    own_processors = True

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """Two CLIPs and, where it is, T5; one transformer."""
        t5 = ("tokenizer_3", "text_encoder_3") if has_t5(checkpoint) else ()
        return {
            "image_encoding": ("vae",),
            "text_encoding": ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", *t5),
            "denoising": ("scheduler", "transformer"),
            "decoding": ("vae",),
        }

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """StableDiffusion3Pipeline's own defaults; the size is the one that the transformer was trained at."""
        schedule = checkpoint.config("scheduler", "scheduler_config.json")
        shifts_by_size = bool(schedule.get("use_dynamic_shifting"))
        size = pixels_per_latent(checkpoint) * int(checkpoint.setting("transformer", "sample_size"))
        return RequestDefaults(
            height=size,
            width=size,
            size_multiple=pixels_per_token(checkpoint),
            num_inference_steps=28,
            guidance_scale=7.0,
            embedded_guidance_scale=None,
            max_sequence_length=256,
            longest_sequence_length=LONGEST_SEQUENCE_LENGTH,
            flow_shift=None if shifts_by_size else float(schedule.get("shift", 1.0)),
            strength=0.6,
            max_images=1,
        )

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Patches of the latents."""
        size = pixels_per_token(checkpoint)
        return (request.height // size) * (request.width // size)

    def num_text_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """CLIP's tokens, and behind them T5's."""
        clip_length = int(checkpoint.setting("tokenizer", "model_max_length", "tokenizer_config.json"))
        return clip_length + request.max_sequence_length

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """Of text and image."""
        return self.num_text_tokens(request, checkpoint) + self.num_image_tokens(request, checkpoint)

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads of the transformer; heads and feed-forward of T5 (the CLIPs are small and stay whole)."""
        if stage_model == "denoising":
            return {"num_attention_heads": checkpoint.setting("transformer", "num_attention_heads")}
        if not has_t5(checkpoint):
            return {}
        return {name: checkpoint.setting("text_encoder_3", name) for name in ("num_heads", "d_ff")}


FAMILY = StableDiffusion3Family()
