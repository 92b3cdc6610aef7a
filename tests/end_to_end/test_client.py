"""The client and its command line against the real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.end_to_end.conftest import RunningServer

from triton_diffusion.config import StageConfig
from triton_diffusion.loading.checkpoint import open_checkpoint
from triton_diffusion.runtime.placing import place_on_cores
from triton_diffusion_client import (
    AsyncDiffusionClient,
    DiffusionClient,
    GenerationResult,
    InvalidRequestError,
    ModelNotFoundError,
    Preview,
    Progress,
    RequestTimeoutError,
    cli,
)

pytestmark = pytest.mark.end_to_end

PROMPT = "a large red circle"
PROTOCOLS = ["grpc", "http"]


def url_of(server: RunningServer, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


@pytest.fixture(params=PROTOCOLS)
def client(request: pytest.FixtureRequest, server: RunningServer) -> Iterator[DiffusionClient]:
    with DiffusionClient(url_of(server, request.param), request.param) as made:
        yield made


def wait_for_cancel(server: RunningServer, num_inference_steps: int) -> None:
    """Wait until the denoising stage reports the cancel of a request of so many steps; each test has its own number."""
    deadline_s = time.monotonic() + 10
    while f"of {num_inference_steps} steps" not in server.process.log_tail(40):
        assert time.monotonic() < deadline_s, "the denoising stage did not hear of the cancel"
        time.sleep(0.05)


def test_every_format_shows_the_same_picture_over_grpc_and_http(client: DiffusionClient) -> None:
    options: Any = {"seed": 3, "num_inference_steps": 2, "num_images_per_prompt": 2}
    raw = client.generate(PROMPT, output_format="raw", **options)
    assert raw.arrays.shape == (2, 128, 128, 3)
    assert raw.seeds == [3, 4]
    png = client.generate(PROMPT, **options)
    assert (png.arrays == raw.arrays).all()
    for output_format, beginning in (("jpeg", b"\xff\xd8"), ("webp", b"RIFF")):
        result = client.generate(PROMPT, output_format=output_format, output_quality=100, **options)
        assert all(data.startswith(beginning) for data in result.data)
        difference = np.abs(result.arrays.astype(int)[:, None] - raw.arrays[None]).mean(axis=(2, 3, 4))
        assert difference.argmin(axis=1).tolist() == [0, 1], "lossy, but nearer to its own picture than to the other"


def test_the_result_tells_seed_times_and_warnings(client: DiffusionClient) -> None:
    result = client.generate(PROMPT, num_inference_steps=3, embedded_guidance_scale=3.5, request_id="the-callers-id")
    again = client.generate(PROMPT, num_inference_steps=3, seed=result.seeds[0])
    assert again.data == result.data
    assert result.request_id == "the-callers-id"
    assert len(result.timings.steps_s) == 3
    assert {"text_encoding", "denoising", "decoding"} <= set(result.timings.stages_s)
    assert sum(result.timings.stages_s.values()) <= result.timings.total_s * 1.05
    assert any("embedded_guidance_scale" in warning for warning in result.warnings)


def test_a_stream_yields_every_step_and_then_the_picture_of_generate(client: DiffusionClient) -> None:
    *progress, result = client.stream(PROMPT, seed=5, num_inference_steps=4)
    assert [(event.step, event.total) for event in progress if isinstance(event, Progress)] == [
        (1, 4),
        (2, 4),
        (3, 4),
        (4, 4),
    ]
    assert isinstance(result, GenerationResult)
    assert result.data == client.generate(PROMPT, seed=5, num_inference_steps=4).data


def test_a_stream_yields_previews(client: DiffusionClient) -> None:
    events = list(client.stream(PROMPT, num_inference_steps=6, preview_interval=2))
    previews = [event for event in events if isinstance(event, Preview)]
    assert previews
    assert {preview.step % 2 for preview in previews} == {0}
    assert [image.size for preview in previews for image in preview.images] == [(128, 128)] * len(previews)
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3, 4, 5, 6]


def test_previews_of_a_raw_stream_can_be_looked_at(server: RunningServer) -> None:
    with DiffusionClient(server.grpc_url) as client:
        events = list(client.stream(PROMPT, num_inference_steps=4, preview_interval=2, output_format="raw"))
    preview = next(event for event in events if isinstance(event, Preview))
    assert preview.images[0].size == (128, 128)
    assert isinstance(events[-1], GenerationResult)
    assert events[-1].arrays.shape == (1, 128, 128, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 7}, "height=7"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"output_format": "gif"}, "gif"),
    ],
)
def test_what_the_server_refuses_is_an_invalid_request(client: DiffusionClient, options: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        client.generate(PROMPT, **options)
    if "output_format" not in options:
        with pytest.raises(InvalidRequestError, match=message):
            list(client.stream(PROMPT, **options))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_that_is_not_there_is_named(server: RunningServer, protocol: Any) -> None:
    with DiffusionClient(url_of(server, protocol), protocol, model="sd", stream_model="sd_stream") as client:
        with pytest.raises(ModelNotFoundError, match="'sd'"):
            client.generate(PROMPT)
        with pytest.raises(ModelNotFoundError, match="'sd_stream'"):
            list(client.stream(PROMPT))
        assert not client.is_ready()


def test_a_server_that_is_ready_says_so(client: DiffusionClient) -> None:
    assert client.is_ready()
    client.wait_until_ready(1)


def test_health_tells_of_each_stage_that_it_is_ready(client: DiffusionClient) -> None:
    health = client.health()
    assert health.ready
    assert {"text_encoding", "denoising", "decoding"} <= set(health.stages)
    assert all(stage.ready for stage in health.stages.values())
    expected = place_on_cores(StageConfig(), "denoising", open_checkpoint("demo")).num_replicas
    assert health.stages["denoising"].ready_replicas == health.stages["denoising"].num_replicas == expected


@pytest.mark.parametrize(("protocol", "steps"), [("grpc", 191), ("http", 192)])
def test_leaving_a_stream_cancels_the_request(server: RunningServer, protocol: Any, steps: int) -> None:
    with DiffusionClient(url_of(server, protocol), protocol) as client:
        for event in client.stream(PROMPT, height=256, width=256, num_inference_steps=steps):
            assert isinstance(event, Progress)
            if event.step == 2:
                break
        wait_for_cancel(server, steps)


@pytest.mark.parametrize(("protocol", "steps"), [("grpc", 193), ("http", 194)])
def test_the_time_out_of_a_stream_cancels_the_request(server: RunningServer, protocol: Any, steps: int) -> None:
    with DiffusionClient(url_of(server, protocol), protocol, timeout_s=1) as client:
        with pytest.raises(RequestTimeoutError):
            list(client.stream(PROMPT, height=256, width=256, num_inference_steps=steps))
        wait_for_cancel(server, steps)


def test_the_time_out_of_generate_cancels_the_request(server: RunningServer) -> None:
    with DiffusionClient(server.grpc_url) as client:
        with pytest.raises(RequestTimeoutError, match="timeout_s=1"):
            client.generate(PROMPT, height=256, width=256, num_inference_steps=195, timeout_s=1)
        wait_for_cancel(server, 195)


@pytest.mark.parametrize(("protocol", "steps"), [("grpc", 196), ("http", 197)])
def test_cancelling_a_task_cancels_its_request(server: RunningServer, protocol: Any, steps: int) -> None:
    async def run() -> None:
        async with AsyncDiffusionClient(url_of(server, protocol), protocol) as client:
            started = asyncio.Event()

            async def read() -> None:
                async for _ in client.stream(PROMPT, height=256, width=256, num_inference_steps=steps):
                    started.set()

            task = asyncio.create_task(read())
            await asyncio.wait_for(started.wait(), 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_for_cancel, server, steps)

    asyncio.run(run())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_threads_and_tasks_get_the_pictures_they_asked_for(server: RunningServer, protocol: Any) -> None:
    seeds = range(8)
    with DiffusionClient(url_of(server, protocol), protocol) as client:
        alone = [client.generate(PROMPT, seed=seed, num_inference_steps=2) for seed in seeds]
        with ThreadPoolExecutor(len(seeds)) as threads:
            results = threads.map(lambda seed: client.generate(PROMPT, seed=seed, num_inference_steps=2), seeds)
            from_threads = list(results)

    async def run() -> list[GenerationResult]:
        async with AsyncDiffusionClient(url_of(server, protocol), protocol) as client:
            return await asyncio.gather(*(client.generate(PROMPT, seed=seed, num_inference_steps=2) for seed in seeds))

    for results in (from_threads, asyncio.run(run())):
        for result, expected in zip(results, alone, strict=True):
            assert result.seeds == expected.seeds
            # Batched with others a picture differs by rounding, from another seed's by far more.
            assert np.abs(result.arrays.astype(int) - expected.arrays).max() <= 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_command_line_makes_pictures(
    server: RunningServer, protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--protocol", protocol, "--url", url_of(server, protocol), "--json", "--output"]
    arguments += [str(tmp_path), "--num-inference-steps", "3", "--seed", "4", "--preview-interval", "2"]
    assert cli.main([*arguments, "--prompt", PROMPT, "--prompt", "a blue star"]) == 0
    pictures = {line["prompt"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert pictures[PROMPT]["path"] == str(tmp_path / "a-large-red-circle-4.png")
    with DiffusionClient(server.grpc_url) as client:
        expected = client.generate("a blue star", seed=4, num_inference_steps=3)
    with Image.open(tmp_path / "a-blue-star-4.png") as saved:
        assert np.abs(np.asarray(saved, dtype=int) - expected.arrays[0]).max() <= 2
    assert (tmp_path / "a-blue-star-step-002.png").exists()


def test_the_command_line_reports_an_invalid_request(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--url", server.grpc_url, "--prompt", PROMPT, "--output", str(tmp_path)]
    assert cli.main([*arguments, "--height", "7"]) == 2
    assert capsys.readouterr().err.startswith("error: height=7")
    assert list(tmp_path.iterdir()) == []
