"""Served pictures against those of diffusers' FluxPipeline in process: same checkpoint, same seeds, float32.

Pictures of several sizes and step counts, one after the other and eight at a time, where requests at different steps
share a batch; then the latents as the stages hand them on, without Triton in between.

Then layouts: a FLUX with random weights over several ranks against itself on one, latents, weights and traffic.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load
from tqdm import tqdm

from benchmarks.in_process import InProcessPipeline, Setup
from benchmarks.layouts.families import SHORT, measure_families
from benchmarks.layouts.parity import LAYOUTS, measure_layouts
from benchmarks.picture import PictureRequest, absolute_model_path, default_sequence_length
from benchmarks.report import Figure, Report, describe_machine
from benchmarks.running import running_server
from triton_diffusion.config import ChainConfig, StageConfig
from triton_diffusion.errors import DiffusionError
from triton_diffusion.families.registry import find_family
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.runtime.held_request import Answer
from triton_diffusion.runtime.service import StageService
from triton_diffusion.stages.input_validation import IncomingRequest, InputValidationStage
from triton_diffusion.state import RequestState, write_state
from triton_diffusion_client import DiffusionClient

_PIXEL_GOAL = 1
_LATENT_GOAL = 1e-4
_DTYPE: Final = "float32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--clients", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("--only", choices=["pictures", "layouts", "families"], help="one section (default: all)")
    parser.add_argument(
        "--layouts",
        choices=["short", "all"],
        default="short",
        help=f"of the families: {', '.join(SHORT)}, or all {len(LAYOUTS)}, which take about twice as long "
        "(default: %(default)s)",
    )


def measure(args: argparse.Namespace) -> Report:
    """Draw every picture on both sides, and compare; then the latents of every layout, and of every family in them."""
    config = StageConfig(model_path=absolute_model_path(args.model_path), dtype=_DTYPE)
    figures: list[Figure] = []
    if args.only in (None, "pictures"):
        figures += _measure_pictures(args, config)
    if args.only in (None, "layouts"):
        figures += measure_layouts()
    if args.only in (None, "families"):
        figures += measure_families(LAYOUTS if args.layouts == "all" else SHORT)
    return Report(machine=describe_machine(dtype=_DTYPE, num_threads=config.threads_per_rank), figures=figures)


def _measure_pictures(args: argparse.Namespace, config: StageConfig) -> list[Figure]:
    model_path = config.model_path
    one_by_one = _different_pictures(model_path)
    at_once = _different_step_counts(model_path, args.clients)
    setup = Setup(
        model_path=model_path, dtype=_DTYPE, num_threads=config.threads_per_rank, tuning={"OMP_WAIT_POLICY": "PASSIVE"}
    )
    with InProcessPipeline(setup) as pipeline:
        expected = [_draw(pipeline, request) for request in tqdm(one_by_one, desc="in process")]
        expected_at_once = [_draw(pipeline, request) for request in tqdm(at_once, desc="in process")]
        expected_latents = [pipeline.generate(request, latents=True).array for request in tqdm(at_once, desc="latents")]
    with (
        running_server({"model_path": model_path, "dtype": _DTYPE, "spare_ranks": "false"}) as server,
        DiffusionClient(server.grpc_address) as client,
    ):
        served = [_ask(client, request) for request in tqdm(one_by_one, desc="served")]
        with ThreadPoolExecutor(args.clients) as threads:
            served_at_once = list(threads.map(lambda request: _ask(client, request), at_once))
    latents_alone = _latents(config, at_once, together=False)
    latents_together = _latents(config, at_once, together=True)
    together = f"{args.clients} at a time"
    figures = [
        _pixel_figure(f"alone: {_title(request)}", [ours], [theirs])
        for request, ours, theirs in zip(one_by_one, served, expected, strict=True)
    ]
    figures += [
        _pixel_figure(f"{together}: {_title(request)}", [ours], [theirs])
        for request, ours, theirs in zip(at_once, served_at_once, expected_at_once, strict=True)
    ]
    figures += [
        _pixel_figure("all pictures", [*served, *served_at_once], [*expected, *expected_at_once]),
        _latents_figure("latents, alone", latents_alone, expected_latents),
        _latents_figure(f"latents, {together}", latents_together, expected_latents),
    ]
    return figures


def _different_pictures(model_path: str) -> list[PictureRequest]:
    first = PictureRequest(
        seed=1,
        height=128,
        width=128,
        num_inference_steps=20,
        max_sequence_length=default_sequence_length(model_path),
    )
    return [
        first,
        dataclasses.replace(first, seed=2, num_inference_steps=1),
        dataclasses.replace(first, seed=3, height=64, width=192, num_inference_steps=12),
        dataclasses.replace(first, seed=4, height=256, width=256, num_inference_steps=8),
        dataclasses.replace(first, seed=5, prompt="a green square", embedded_guidance_scale=1.0),
        dataclasses.replace(first, seed=6, guidance_scale=3.0, negative_prompt="a blue star"),
        dataclasses.replace(first, seed=7, max_sequence_length=16),
    ]


def _different_step_counts(model_path: str, count: int) -> list[PictureRequest]:
    """Requests of one size, so that they may share batches, that join and leave at different steps."""
    first = _different_pictures(model_path)[0]
    return [dataclasses.replace(first, seed=100 + index, num_inference_steps=5 + 3 * index) for index in range(count)]


def _title(request: PictureRequest) -> str:
    guided = f", guidance {request.guidance_scale:g}" if request.guidance_scale > 1 else ""
    return f"{request.width}x{request.height}, {request.num_inference_steps} steps, seed {request.seed}{guided}"


def _draw(pipeline: InProcessPipeline, request: PictureRequest) -> NDArray[np.uint8]:
    return pipeline.generate(request).array


def _ask(client: DiffusionClient, request: PictureRequest) -> NDArray[np.uint8]:
    return client.generate(request.prompt, **request.client_options()).outputs[0].array


def _latents(config: StageConfig, requests: Sequence[PictureRequest], *, together: bool) -> list[NDArray[np.float32]]:
    """Latents (S, C) of every request from the stages' services."""
    blobs = [_begin(request, config.model_path) for request in requests]
    for stage_model in ("text_encoding", "denoising"):
        service = StageService(stage_model, config)
        service.start()
        try:
            if together:
                blobs = [future.result() for future in [_submit(service, blob) for blob in blobs]]
            else:
                blobs = [_submit(service, blob).result() for blob in blobs]
        finally:
            service.stop()
    return [load(blob)["latents"][0] for blob in blobs]


def _begin(request: PictureRequest, model_path: str) -> bytes:
    """The state that the chain model hands to the first stage."""
    given = {"prompt": request.prompt, **request.client_options()}
    incoming = IncomingRequest(given)
    checkpoint = open_checkpoint(model_path)
    family = find_family(checkpoint)
    limits = ChainConfig(model_path=model_path)
    InputValidationStage(family, family.defaults(checkpoint), limits)([incoming])
    assert incoming.request is not None
    return write_state(RequestState(f"parity-{request.seed}", incoming.request))


def _submit(service: StageService, blob: bytes) -> Future[bytes]:
    future: Future[bytes] = Future()

    def on_answer(answer: Answer) -> None:
        if isinstance(answer, DiffusionError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    service.submit(blob, on_answer)
    return future


def _pixel_figure(name: str, ours: Sequence[NDArray[np.uint8]], theirs: Sequence[NDArray[np.uint8]]) -> Figure:
    difference = max(np.abs(a.astype(int) - b).max() for a, b in zip(ours, theirs, strict=True))
    return Figure(name=f"{name}: largest difference of a pixel", value=int(difference), at_most=_PIXEL_GOAL)


def _latents_figure(name: str, ours: Sequence[NDArray[np.float32]], theirs: Sequence[NDArray[np.float32]]) -> Figure:
    difference = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    return Figure(name=f"{name}: largest difference", value=float(difference), at_most=_LATENT_GOAL)
