"""The picture that is asked for, on both sides with the same words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.request import RequestDefaults

PROMPT = "a large red circle above a small blue star on a gray background"


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """What to draw. Nothing is left to a default, which could differ between the sides."""

    seed: int
    height: int
    width: int
    num_inference_steps: int
    max_sequence_length: int
    prompt: str = PROMPT
    negative_prompt: str = ""
    guidance_scale: float = 1.0
    """Above 1: classifier-free guidance, which diffusers' FluxPipeline calls true_cfg_scale."""
    embedded_guidance_scale: float = 3.5

    def client_options(self) -> dict[str, Any]:
        """The options of DiffusionClient.generate."""
        return {
            "negative_prompt": self.negative_prompt,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "embedded_guidance_scale": self.embedded_guidance_scale,
            "seed": self.seed,
            "max_sequence_length": self.max_sequence_length,
            "output_format": "png",
        }

    def pipeline_arguments(self) -> dict[str, Any]:
        """The arguments of FluxPipeline, but for the generator."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt if self.guidance_scale > 1 else None,
            "true_cfg_scale": self.guidance_scale,
            "guidance_scale": self.embedded_guidance_scale,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_inference_steps,
            "max_sequence_length": self.max_sequence_length,
        }


def absolute_model_path(model_path: str) -> str:
    """A folder's full name: server and ranks run elsewhere. Other model paths stay as they are."""
    folder = Path(model_path).expanduser()
    return str(folder.resolve()) if model_path != "demo" and folder.is_dir() else model_path


def request_defaults(model_path: str) -> RequestDefaults:
    """What the server takes for a checkpoint where a request leaves a value open."""
    checkpoint = open_checkpoint(model_path)
    return find_family(checkpoint).defaults(checkpoint)


def default_sequence_length(model_path: str) -> int:
    """The length that the server pads a prompt to, unless told otherwise."""
    return request_defaults(model_path).max_sequence_length
