"""Pictures through the real tritonserver, compared with diffusers' FluxPipeline in this process."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from tests.end_to_end.conftest import RunningServer

from triton_diffusion.loading.checkpoint import DEMO_CHECKPOINT

pytestmark = pytest.mark.end_to_end

PROMPT = "a large red circle above a small blue square on a gray background"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = FluxPipeline.from_pretrained(DEMO_CHECKPOINT, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(pipeline: Any, prompt: str, seed: int, **options: Any) -> np.ndarray:
    options = {"height": 128, "width": 128, "max_sequence_length": pipeline.tokenizer_2.model_max_length} | options
    image = pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]
    return np.asarray(image)


def raw(result: Any) -> np.ndarray:
    return result.as_numpy("raw_image")


def difference(left: np.ndarray, right: np.ndarray) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 8},
        {"num_inference_steps": 1},
        {"num_inference_steps": 4, "height": 64, "width": 192},
        {"num_inference_steps": 4, "height": 256, "width": 128},
    ],
)
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_served_picture_is_that_of_the_diffusers_pipeline(
    server: RunningServer, pipeline: Any, options: dict[str, int], protocol: str
) -> None:
    result = server.infer(protocol=protocol, prompt=PROMPT, seed=7, output_format="raw", **options)
    error = difference(raw(result)[0], reference(pipeline, PROMPT, 7, **options))
    print(f"uint8 difference {error}")
    assert error <= 1


def test_guidance_is_the_true_cfg_of_the_pipeline(server: RunningServer, pipeline: Any) -> None:
    result = server.infer(
        prompt=PROMPT,
        negative_prompt="a green star",
        guidance_scale=2.5,
        num_inference_steps=4,
        seed=3,
        output_format="raw",
    )
    expected = reference(pipeline, PROMPT, 3, num_inference_steps=4, true_cfg_scale=2.5, negative_prompt="a green star")
    assert difference(raw(result)[0], expected) <= 1


def test_requests_at_different_steps_share_batches_without_touching_each_other(
    server: RunningServer, pipeline: Any
) -> None:
    def draw(index: int) -> np.ndarray:
        result = server.infer(
            prompt=f"a small {color} star",
            seed=index,
            num_inference_steps=3 + index,
            guidance_scale=1.0 + index % 3,
            output_format="raw",
        )
        return raw(result)[0]

    color = "green"
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(draw, range(8)))
    for index, picture in enumerate(pictures):
        options = {} if index % 3 == 0 else {"true_cfg_scale": 1.0 + index % 3, "negative_prompt": ""}
        expected = reference(pipeline, f"a small {color} star", index, num_inference_steps=3 + index, **options)
        assert difference(picture, expected) <= 1


def test_every_output_can_be_drawn_again_alone_from_its_seed(server: RunningServer) -> None:
    together = server.infer(prompt=PROMPT, seed=40, num_outputs=3, num_inference_steps=3, output_format="raw")
    seeds = together.as_numpy("seed")
    assert seeds.tolist() == [40, 41, 42]
    alone = server.infer(prompt=PROMPT, seed=int(seeds[2]), num_inference_steps=3, output_format="raw")
    assert difference(raw(together)[2], raw(alone)[0]) <= 1


def test_without_a_seed_each_request_draws_another_picture_and_says_its_seed(server: RunningServer) -> None:
    first, second = (server.infer(prompt=PROMPT, num_inference_steps=2, output_format="raw") for _ in range(2))
    assert first.as_numpy("seed")[0] != second.as_numpy("seed")[0]
    again = server.infer(prompt=PROMPT, num_inference_steps=2, seed=int(first.as_numpy("seed")[0]), output_format="raw")
    assert difference(raw(first), raw(again)) <= 1


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    ("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("b64_png", "PNG"), ("b64_webp", "WEBP")]
)
def test_every_output_format_holds_the_picture(server: RunningServer, name: str, kind: str, protocol: str) -> None:
    common = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2}
    data = server.infer(protocol=protocol, output_format=name, **common).as_numpy("generated_image")[0]
    image = Image.open(io.BytesIO(base64.b64decode(data) if name.startswith("b64_") else data))
    assert (image.format, image.size) == (kind, (128, 128))
    expected = raw(server.infer(output_format="raw", **common))[0]
    if kind == "PNG":
        assert difference(np.asarray(image), expected) <= 1
    else:
        assert np.abs(np.asarray(image).astype(int) - expected.astype(int)).mean() < 25


def test_timings_say_where_the_time_went(server: RunningServer) -> None:
    timings = json.loads(server.infer(prompt=PROMPT, num_inference_steps=5).as_numpy("timings")[0])
    assert set(timings["stages_s"]) == {"input_validation", "text_encoding", "denoising", "decoding"}
    assert len(timings["steps_s"]) == 5
    assert 0 < sum(timings["steps_s"]) <= timings["stages_s"]["denoising"]
    assert sum(timings["stages_s"].values()) + timings["queue_s"] <= timings["total_s"]


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(server: RunningServer, pipeline: Any) -> None:
    prompt = PROMPT + " and a small green star" * 20
    result = server.infer(prompt=prompt, seed=5, num_inference_steps=2, output_format="raw")
    (warning,) = json.loads(result.as_numpy("timings")[0])["warnings"]
    assert "was cut to max_sequence_length=" in warning
    assert difference(raw(result)[0], reference(pipeline, prompt, 5, num_inference_steps=2)) <= 1


def test_the_generate_endpoint_answers_json_with_base64(server: RunningServer) -> None:
    body = json.dumps({"prompt": PROMPT, "seed": 1, "num_inference_steps": 2}).encode()
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/diffusion/generate", data=body)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    image = Image.open(io.BytesIO(base64.b64decode(answer["generated_image"])))
    assert image.size == (128, 128)
    assert answer["seed"] == 1


def test_the_metrics_page_counts_requests_and_steps_of_every_stage(server: RunningServer) -> None:
    def read() -> dict[str, float]:
        with urllib.request.urlopen(server.process.metrics_url, timeout=60) as response:
            lines = [line for line in response.read().decode().splitlines() if line.startswith("diffusion_")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    time.sleep(1.5)  # until what earlier tests did has been published
    before = read()
    server.infer(prompt=PROMPT, num_inference_steps=7)
    deadline = time.monotonic() + 10
    done = 'diffusion_requests_done_total{model="denoising"}'
    while (after := read())[done] == before[done]:
        assert time.monotonic() < deadline, "the metrics were not published"
        time.sleep(0.2)
    assert after[done] - before[done] == 1
    assert after['diffusion_ticks_total{model="denoising"}'] - before['diffusion_ticks_total{model="denoising"}'] == 7
    assert after['diffusion_queue_depth{model="denoising"}'] == 0
    assert after['diffusion_ready_replicas{model="denoising"}'] == len(server.ranks("denoising"))
