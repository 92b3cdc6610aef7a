"""`triton-diffusion generate`: all prompts at once, a progress bar each."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from tqdm import tqdm

from triton_diffusion_client._output_files import OutputFiles, plan_output
from triton_diffusion_client._protocol import GenerationOptions
from triton_diffusion_client._terminal import (
    EXIT_OK,
    client_options,
    print_line,
    report_error,
    retry_options,
    run_command,
)
from triton_diffusion_client.async_client import AsyncDiffusionClient
from triton_diffusion_client.errors import DiffusionClientError, ModelNotFoundError
from triton_diffusion_client.results import GeneratedImage, GeneratedVideo, GenerationResult, Preview, Progress

if TYPE_CHECKING:
    ProgressBar = tqdm[NoReturn]

_OPTIONS = (
    "negative_prompt",
    "strength",
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "embedded_guidance_scale",
    "flow_shift",
    "seed",
    "num_images_per_prompt",
    "max_sequence_length",
    "output_quality",
    "priority",
    "deadline_s",
    "deadline_action",
    "request_id",
)
_BAR_FORMAT = "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt}{postfix}"
_MAX_BAR_LABEL_LENGTH = 32


def generate(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _generate(args), interrupted="the requests under way were cancelled")


def _generate(args: argparse.Namespace) -> int:
    if args.request_id is not None and len(args.prompt) != 1:
        raise ValueError(
            f"--request-id {args.request_id} names one request, but {len(args.prompt)} prompts are given; "
            "give one --prompt, or no --request-id"
        )
    num_outputs = len(args.prompt) * (args.num_images_per_prompt or 1)
    files = plan_output(args.output, args.output_format, num_outputs)
    options = {option: getattr(args, option) for option in _OPTIONS}
    options |= {"image": _read_images(args.image), "output_format": files.output_format}
    return asyncio.run(_generate_all(args, cast(GenerationOptions, options), files))


def _read_images(paths: list[str]) -> list[bytes] | None:
    """The files once, for all prompts; None for none. Raises ValueError for one that cannot be read."""
    try:
        return [Path(path).read_bytes() for path in paths] or None
    except OSError as error:
        raise ValueError(f"--image {error.filename}: {error.strerror}") from error


async def _generate_all(args: argparse.Namespace, options: GenerationOptions, files: OutputFiles) -> int:
    # The lines of the terminal that are free for a progress bar: as many as requests may run at a time.
    positions: asyncio.Queue[int] = asyncio.Queue()
    for position in range(args.concurrency):
        positions.put_nowait(position)

    async def run(prompt: str) -> int:
        position = await positions.get()
        try:
            return await _generate_one(client, prompt, position, args, options, files)
        finally:
            positions.put_nowait(position)

    async with AsyncDiffusionClient(
        model=args.model,
        stream_model=args.stream_model,
        cancel_scope=args.cancel_scope,
        **client_options(args),
        **retry_options(args),
    ) as client:
        codes = await asyncio.gather(*(run(prompt) for prompt in args.prompt))
    return max(codes)


async def _generate_one(
    client: AsyncDiffusionClient,
    prompt: str,
    position: int,
    args: argparse.Namespace,
    options: GenerationOptions,
    files: OutputFiles,
) -> int:
    label = prompt if len(prompt) <= _MAX_BAR_LABEL_LENGTH else f"{prompt[: _MAX_BAR_LABEL_LENGTH - 1]}…"
    where = f"{label!r}: " if len(args.prompt) > 1 else ""
    try:
        if args.no_stream:
            result = await client.generate(prompt, **options)
        else:
            result = await _stream_one(client, prompt, label, position, args, options, files)
        for output in result.outputs:
            _report(output, result, prompt, args, files)
    except (DiffusionClientError, OSError) as error:
        return report_error(error, where=where, hints={ModelNotFoundError: _model_hint(args)})
    for warning in result.warnings:
        print_line(f"warning: {where}{warning}", sys.stderr)
    return EXIT_OK


async def _stream_one(
    client: AsyncDiffusionClient,
    prompt: str,
    label: str,
    position: int,
    args: argparse.Namespace,
    options: GenerationOptions,
    files: OutputFiles,
) -> GenerationResult:
    events = client.stream(prompt, preview_interval=args.preview_interval, **options)
    with _progress_bar(label, position, args.quiet) as bar:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    _show(bar, event)
                elif isinstance(event, Preview):
                    for data in event.data:
                        path = files.save_preview(data, prompt, event.step)
                        if not args.quiet:
                            print_line(f"preview {path}", sys.stderr)
                else:
                    return event
    raise AssertionError("a stream ends with a result or an error")


def _model_hint(args: argparse.Namespace) -> str:
    name_it = "name the server's chain with --model"
    return name_it if args.no_stream else f"{name_it}; a server without such a stream may do with --no-stream"


@contextmanager
def _progress_bar(label: str, position: int, quiet: bool) -> Iterator[ProgressBar]:
    # Shown on a terminal only.
    bar: ProgressBar = tqdm(
        total=1,
        desc=label,
        position=position,
        leave=False,
        bar_format=_BAR_FORMAT,
        dynamic_ncols=True,
        disable=True if quiet else None,
    )
    try:
        yield bar
    finally:
        bar.close()


def _show(bar: ProgressBar, progress: Progress) -> None:
    if bar.disable:
        return
    remaining = "" if progress.remaining_s is None else f", {progress.remaining_s:.1f} s left"
    bar.total, bar.n = progress.total, progress.step
    restarted = f", started anew {progress.restarts} times" if progress.restarts else ""
    bar.set_postfix_str(f"{progress.stage}, {progress.elapsed_s:.1f} s{remaining}{restarted}", refresh=True)


def _report(
    output: GeneratedImage | GeneratedVideo,
    result: GenerationResult,
    prompt: str,
    args: argparse.Namespace,
    files: OutputFiles,
) -> None:
    path = files.save_output(output.data, prompt, output.seed)
    timings = result.timings
    if args.json:
        fields = {
            "path": str(path),
            "prompt": prompt,
            "seed": output.seed,
            "request_id": result.request_id,
            "timings": asdict(timings),
            "warnings": list(result.warnings),
        }
        print_line(json.dumps(fields, ensure_ascii=False), sys.stdout)
    elif args.quiet:
        print_line(str(path), sys.stdout)
    else:
        parts = {"queue": timings.queue_s, **timings.stages_s}
        spent = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        print_line(f"{path}  seed {output.seed}  {timings.total_s:.2f} s ({spent})", sys.stdout)
