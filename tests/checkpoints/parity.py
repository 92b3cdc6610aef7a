"""Our stages and the diffusers pipeline on one checkpoint: same seed, same latents, same picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from checkpoints.stages import InProcessStages, Picture
from triton_diffusion.request import GenerationRequest

TOLERANCE = 1e-4
"""Of latents; pixels are within 1."""

Arguments = Callable[[GenerationRequest, list[Image.Image]], dict[str, Any]]


def common_arguments(request: GenerationRequest, *, videos: bool = False) -> dict[str, Any]:
    """Those that all pipelines of pictures, or of videos, have."""
    return {
        "prompt": request.prompt,
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "num_videos_per_prompt" if videos else "num_images_per_prompt": request.num_outputs,
        "max_sequence_length": request.max_sequence_length,
        **({"num_frames": request.num_frames} if videos else {}),
    }


def guided_arguments(request: GenerationRequest, *, videos: bool = False) -> dict[str, Any]:
    """With guidance where the pipeline's guidance_scale is ours."""
    guidance = {"negative_prompt": request.negative_prompt, "guidance_scale": request.guidance_scale}
    return common_arguments(request, videos=videos) | guidance


def distilled_arguments(request: GenerationRequest, *, videos: bool = False) -> dict[str, Any]:
    """With guidance where the pipeline's guidance_scale is fed to the model, and ours is its true_cfg_scale."""
    return common_arguments(request, videos=videos) | {
        "negative_prompt": request.negative_prompt,
        "true_cfg_scale": request.guidance_scale,
        "guidance_scale": request.embedded_guidance_scale,
    }


class Pair:
    """Stages and reference on one checkpoint, in float32 on the CPU."""

    def __init__(
        self, folder: Path, pipeline_class: Any, arguments: Arguments, *, checkpoint_folder: Path | None = None
    ) -> None:
        """arguments: those of the pipeline that a request (and its pictures) means, but for `generator` and
        `output_type`. checkpoint_folder: where the pipeline reads, if not in `folder`.
        """
        self.stages = InProcessStages(folder)
        self.pipeline = pipeline_class.from_pretrained(checkpoint_folder or folder, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self._arguments = arguments

    def reference(self, request: GenerationRequest, images: Sequence[Picture] = (), output_type: str = "latent") -> Any:
        """The pipeline's result, with a generator for each output."""
        arguments = self._arguments(request, [Image.fromarray(image) for image in images])
        seeds = request.output_seeds
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.random.fork_rng():
            result = self.pipeline(
                **arguments,
                generator=generators if len(generators) > 1 else generators[0],
                output_type=output_type,
                return_dict=True,
            )
        return result.frames if hasattr(result, "frames") else result.images

    def check_latents(self, request: GenerationRequest, images: Sequence[Picture] = ()) -> torch.Tensor:
        """Assert that both draw the same latents; returns ours."""
        ours = self.stages.latents(request, images=images)
        assert_close(ours, self.reference(request, images))
        return ours

    def check_pictures(self, request: GenerationRequest, images: Sequence[Picture] = ()) -> torch.Tensor:
        """Assert that both draw the same pictures or frames, which are not flat; returns ours."""
        ours = self.stages.pictures(request, images)
        drawn = self.reference(request, images, "np")
        theirs = torch.from_numpy((np.asarray(drawn) * 255).round().astype(int))
        assert ours.shape == theirs.shape or ours.shape == theirs[:, 0].shape
        assert theirs.float().std() > 5, "a flat picture would hide every error"
        error = (ours.int() - theirs.reshape(ours.shape)).abs().max().item()
        print(f"largest error of a pixel {error}")
        assert error <= 1
        return ours

    def check_batch(
        self,
        requests: Mapping[str, GenerationRequest],
        joins: Mapping[str, int],
        images: Mapping[str, Sequence[Picture]] | None = None,
    ) -> None:
        """Assert that requests which share their batches come out as from a pipeline of their own."""
        results = self.stages.run_batched(requests, joins, images)
        for request_id, request in requests.items():
            assert_close(results[request_id], self.reference(request, (images or {}).get(request_id, ())))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within TOLERANCE; prints by how much."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max().item()
    print(f"largest error {error:.2e} of {theirs.abs().max().item():.2f}")
    assert error < TOLERANCE


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a change is so large that a comparison within TOLERANCE would have seen it."""
    return (one - other).abs().max().item() > 20 * TOLERANCE
