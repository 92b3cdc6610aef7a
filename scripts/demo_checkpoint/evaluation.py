"""How often the demo checkpoint draws what it is asked for, on prompts that the training never saw."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from demo_checkpoint import scenes
from demo_checkpoint.judge import Verdict, judge

_SEED = 2024
_BATCH_SIZE = 20
_COLUMNS = 8
_CAPTION_HEIGHT_PX = 40


@dataclass(frozen=True, kw_only=True)
class Result:
    """One held-out prompt, its picture and the judge's verdict."""

    scene: scenes.Scene
    """What the picture should show."""
    prompt: str
    """The scene in words."""
    picture: Image.Image
    """What the checkpoint drew."""
    verdict: Verdict
    """What is right about it."""


def draw_and_judge(pipeline: FluxPipeline, *, num_prompts: int, num_inference_steps: int) -> list[Result]:
    """Draw held-out prompts, without classifier-free guidance, and judge each picture."""
    rng = random.Random(f"evaluation {_SEED}")
    held_out = scenes.random_scenes(num_prompts, _SEED, held_out=True)
    prompts = [scenes.caption(scene, rng) for scene in held_out]
    results = []
    for start in tqdm(range(0, num_prompts, _BATCH_SIZE), desc="evaluation", mininterval=5):
        batch = slice(start, start + _BATCH_SIZE)
        pictures = draw_prompts(pipeline, prompts[batch], num_inference_steps=num_inference_steps, first_seed=start)
        for scene, prompt, picture in zip(held_out[batch], prompts[batch], pictures, strict=True):
            verdict = judge(picture, scene)
            results.append(Result(scene=scene, prompt=prompt, picture=picture, verdict=verdict))
    return results


def draw_prompts(
    pipeline: FluxPipeline, prompts: list[str], *, num_inference_steps: int, first_seed: int
) -> list[Image.Image]:
    """Draw prompts as one batch; the picture of a prompt depends on its seed alone, not on the batch."""
    return pipeline(
        prompts,
        height=scenes.PICTURE_SIZE,
        width=scenes.PICTURE_SIZE,
        num_inference_steps=num_inference_steps,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))],
    ).images


def summary(results: Sequence[Result]) -> str:
    """Say how many pictures are right, in all and by property."""
    lines = [_share("all right", [result.verdict.right for result in results])]
    names = [field.name for field in fields(Verdict)]
    lines += [_share(name, [getattr(result.verdict, name) for result in results]) for name in names]
    for number in (1, 2):
        of_number = [result.verdict.right for result in results if len(result.scene.objects) == number]
        lines.append(_share(f"{number} object{'s' * (number > 1)}", of_number))
    for shape in scenes.SHAPES:
        with_shape = [r.verdict.right for r in results if shape in {thing.shape for thing in r.scene.objects}]
        lines.append(_share(f"with a {shape}", with_shape))
    return "\n".join(lines)


def _share(name: str, outcomes: list[bool]) -> str:
    percent = 100 * sum(outcomes) / max(1, len(outcomes))
    return f"{name:16} {sum(outcomes):4} of {len(outcomes):4}  {percent:5.1f} %"


def contact_sheet(results: Sequence[Result]) -> Image.Image:
    """Show pictures in a grid, each with its prompt and a green or a red mark: right or wrong."""
    size, gap = scenes.PICTURE_SIZE, 6
    rows = -(-len(results) // _COLUMNS)
    cell = (size + gap, size + gap + _CAPTION_HEIGHT_PX)
    sheet = Image.new("RGB", (_COLUMNS * cell[0] + gap, rows * cell[1] + gap), (235, 235, 235))
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for i, result in enumerate(results):
        x, y = gap + i % _COLUMNS * cell[0], gap + i // _COLUMNS * cell[1]
        sheet.paste(result.picture, (x, y))
        words = "\n".join(textwrap.wrap(result.prompt, 25)[:3])
        canvas.multiline_text((x + 12, y + size + 1), words, fill=(0, 0, 0), font=font, spacing=1)
        mark = (20, 150, 60) if result.verdict.right else (215, 20, 30)
        canvas.ellipse((x, y + size + 4, x + 8, y + size + 12), fill=mark)
    return sheet.quantize(128, dither=Image.Dither.NONE)
