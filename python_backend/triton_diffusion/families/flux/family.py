"""FLUX as the Triton processes know it: defaults and cost, from the checkpoint's configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from triton_diffusion.families.base import ModelFamily
from triton_diffusion.families.flux.kontext import PREFERRED_AREA, preferred_size
from triton_diffusion.loading.checkpoint import Checkpoint
from triton_diffusion.request import GenerationRequest, RequestDefaults

# The transformer takes 2 x 2 latent pixels as one token (latents.PATCH_SIZE, whose module needs torch).
PATCH_SIZE = 2
# diffusers' FluxPipeline refuses more T5 tokens than this.
LONGEST_SEQUENCE_LENGTH = 512
# Where a pipeline's own default of guidance_scale is not FluxPipeline's.
_GUIDANCE = {"FluxImg2ImgPipeline": 7.0}


def pixels_per_token(checkpoint: Checkpoint) -> int:
    """Pixels along one side of the square that one token stands for."""
    halvings = len(checkpoint.setting("vae", "block_out_channels")) - 1
    size: int = PATCH_SIZE * 2**halvings
    return size


def is_kontext(checkpoint: Checkpoint) -> bool:
    """Whether pictures stand beside the one that is drawn; otherwise a picture is changed (img2img)."""
    return checkpoint.pipeline_class == "FluxKontextPipeline"


class FluxFamily(ModelFamily):
    """FLUX.1-dev, FLUX.1-schnell, FLUX.1-Kontext-dev and checkpoints trained from them."""

    name = "flux"
    pipeline_classes = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline")
    tasks = ("text-to-image", "image-to-image")

    def stage_components(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        """CLIP and T5; one transformer."""
        return {
            "image_encoding": ("vae",),
            "text_encoding": ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
            "denoising": ("scheduler", "transformer"),
            "decoding": ("vae",),
        }

    def defaults(self, checkpoint: Checkpoint) -> RequestDefaults:
        """The pipelines' own defaults, but for two that the checkpoint's files know better.

        The size is the one the autoencoder was trained at, the sequence length that of the T5 tokenizer. A checkpoint
        that neither takes a guidance scale nor shifts its schedule is distilled to few steps (schnell): 4.
        """
        schedule = checkpoint.config("scheduler", "scheduler_config.json")
        text_length = int(checkpoint.setting("tokenizer_2", "model_max_length", "tokenizer_config.json"))
        guidance_distilled = bool(checkpoint.setting("transformer", "guidance_embeds"))
        few_steps = not guidance_distilled and not schedule.get("use_dynamic_shifting")
        size = int(checkpoint.setting("vae", "sample_size"))
        return RequestDefaults(
            height=size,
            width=size,
            size_multiple=pixels_per_token(checkpoint),
            num_inference_steps=4 if few_steps else 28,
            guidance_scale=1.0,
            embedded_guidance_scale=_GUIDANCE.get(checkpoint.pipeline_class, 3.5) if guidance_distilled else None,
            max_sequence_length=min(LONGEST_SEQUENCE_LENGTH, text_length),
            longest_sequence_length=LONGEST_SEQUENCE_LENGTH,
            strength=None if is_kontext(checkpoint) else 0.6,
            max_images=1,
        )

    def default_size(self, defaults: RequestDefaults, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Kontext, which knows no strength, draws in the proportions of the picture that it is given."""
        if image_sizes and defaults.strength is None:
            return preferred_size(*image_sizes[0], defaults.size_multiple)
        return super().default_size(defaults, image_sizes)

    def num_image_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """2 x 2 patches of the latents."""
        size = pixels_per_token(checkpoint)
        return (request.height // size) * (request.width // size)

    def num_tokens(self, request: GenerationRequest, checkpoint: Checkpoint) -> int:
        """With those of the picture that stands beside in Kontext."""
        tokens = super().num_tokens(request, checkpoint)
        if is_kontext(checkpoint) and request.num_images:
            tokens += PREFERRED_AREA // pixels_per_token(checkpoint) ** 2
        return tokens

    def head_counts(self, stage_model: str, checkpoint: Checkpoint) -> Mapping[str, int]:
        """Heads of the transformer; heads and feed-forward of T5 (CLIP is small and stays whole)."""
        if stage_model == "denoising":
            return {"num_attention_heads": checkpoint.setting("transformer", "num_attention_heads")}
        return {name: checkpoint.setting("text_encoder_2", name) for name in ("num_heads", "d_ff")}


FAMILY = FluxFamily()
