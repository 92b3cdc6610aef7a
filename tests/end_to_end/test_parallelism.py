"""A server whose stages have several ranks each: cfg 2 x ring 2 in denoising, shared T5 weights, shared tiles."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tests.end_to_end.conftest import RunningServer, own_server
from tritonclient.utils import InferenceServerException

from checkpoints.reference import Reference
from checkpoints.requests import make_request
from triton_diffusion.loading.checkpoint import DEMO_CHECKPOINT
from triton_diffusion_client import DiffusionClient, RequestCancelledError

pytestmark = pytest.mark.end_to_end

PROMPT = "a large red circle"
Picture = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def parallel(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Starts behind the server of all tests, whose shared memory stays when this one goes."""
    settings = {
        "dtype": "float32",
        "warmup_resolutions": "none",
        "max_batch_tokens": "1000",
        "num_gpus": "0",
        "denoising.ring_degree": "2",
        "denoising.enable_cfg_parallel": "true",
        "text_encoding.tp_size": "2",
        "decoding.num_gpus": "2",
        "decoding.dp_size": "1",
    }
    with own_server(tmp_path_factory.mktemp("parallel"), settings) as running:
        yield running


def draw(server: RunningServer, **options: Any) -> Picture:
    picture: Picture = server.infer(prompt=PROMPT, output_format="raw", **options).as_numpy("raw_image")
    return picture


def difference(one: Picture, other: Picture) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_every_stage_has_its_ranks(parallel: RunningServer) -> None:
    assert [len(parallel.ranks(stage)) for stage in ("text_encoding", "denoising", "decoding")] == [2, 4, 2]


def test_pictures_are_those_of_one_rank_a_stage(server: RunningServer, parallel: RunningServer) -> None:
    """Alone and in shared batches: with and without guidance, at different steps."""
    options: list[dict[str, Any]] = [
        {"seed": 1, "num_inference_steps": 6},
        {"seed": 2, "num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "a blue star"},
        {"seed": 3, "num_inference_steps": 3},
        {"seed": 4, "num_inference_steps": 5, "guidance_scale": 2.0, "num_outputs": 2},
    ]
    expected = [draw(server, **each) for each in options]
    alone = [draw(parallel, **each) for each in options]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda each: draw(parallel, **each), 2 * options))
    for one, other in zip(3 * expected, alone + together, strict=True):
        assert difference(one, other) <= 1


def test_tiles_made_by_two_ranks_are_those_of_the_pipeline(parallel: RunningServer) -> None:
    request = make_request(prompt=PROMPT, seed=5, height=256, width=208, num_inference_steps=2, max_sequence_length=48)
    (expected,) = Reference(DEMO_CHECKPOINT, tiling=True).pictures(request)
    options = {"height": 256, "width": 208, "num_inference_steps": 2, "max_sequence_length": 48}
    (picture,) = draw(parallel, seed=5, embedded_guidance_scale=3.5, **options)
    assert difference(expected, picture) <= 1


def test_a_cancelled_request_leaves_all_ranks(parallel: RunningServer) -> None:
    with DiffusionClient(parallel.grpc_url) as client, ThreadPoolExecutor(1) as pool:
        options: dict[str, Any] = {"num_inference_steps": 200, "guidance_scale": 3.0}
        future = pool.submit(client.generate, PROMPT, request_id="long", **options)
        time.sleep(1)
        assert client.cancel("long")
        assert isinstance(future.exception(timeout=30), RequestCancelledError)
    parallel.wait_until_idle()
    assert draw(parallel, seed=1, num_inference_steps=1).shape == (1, 128, 128, 3)


@pytest.mark.parametrize("index", [0, 3])
def test_requests_survive_the_death_of_any_rank_of_the_group(parallel: RunningServer, index: int) -> None:
    options: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 3.0}
    expected = [draw(parallel, seed=seed, **options) for seed in range(2)]
    before = parallel.ranks("denoising")
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(draw, parallel, seed=seed, **options) for seed in range(2)]
        time.sleep(0.4)
        before[index].send_signal(signal.SIGKILL)
        pictures = [future.result(timeout=120) for future in futures]
    for one, other in zip(expected, pictures, strict=True):
        assert difference(one, other) <= 1
    assert not {rank.pid for rank in before} & {rank.pid for rank in parallel.ranks("denoising")}


def test_bad_input_is_refused_and_the_ranks_go_on(parallel: RunningServer) -> None:
    with pytest.raises(InferenceServerException, match="multiple"):
        draw(parallel, height=100)
    assert draw(parallel, seed=1, num_inference_steps=1) is not None
