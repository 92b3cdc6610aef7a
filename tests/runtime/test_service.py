"""Requests in a StageService of one rank a stage: results, progress, cancels, and errors that are one request's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from checkpoints.reference import Reference
from checkpoints.requests import make_blob, make_request
from checkpoints.services import Caller, error_of, result_of, run_services
from triton_diffusion.errors import (
    DiffusionError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    StageError,
)
from triton_diffusion.request import GenerationRequest
from triton_diffusion.state import STATE, ProgressQuery, RequestState, read_progress, read_state, write_progress_query

MAX_QUEUE_SIZE = 4
FOREVER = 100_000
"""Steps of a request that a test cancels."""


@pytest.fixture(scope="module")
def stages(flux_checkpoint: Path) -> Iterator[dict[str, Caller]]:
    with run_services(flux_checkpoint, max_queue_size=MAX_QUEUE_SIZE) as callers:
        yield callers


@pytest.fixture(scope="module")
def denoising(stages: dict[str, Caller]) -> Caller:
    return stages["denoising"]


class Encoded:
    """Encoded requests, as the denoising stage takes them."""

    def __init__(self, stages: dict[str, Caller]) -> None:
        self._stages = stages

    def __call__(self, request_id: str, **values: Any) -> bytes:
        return self._stages["text_encoding"].run(make_blob(request_id, make_request(**values)))


@pytest.fixture(scope="module")
def encoded(stages: dict[str, Caller]) -> Encoded:
    return Encoded(stages)


def latents_of(blob: bytes) -> torch.Tensor:
    return load(blob)["latents"]


def assert_latents(blob: bytes, reference: Reference, request: GenerationRequest) -> None:
    error = (latents_of(blob) - reference.latents(request)).abs().max().item()
    print(f"largest error {error:.2e}")
    assert error < 1e-4


# Results.


def test_three_stages_draw_the_pipelines_picture(stages: dict[str, Caller], reference: Reference) -> None:
    request = make_request(num_outputs=2, guidance_scale=2.0, negative_prompt="dark")
    blob = make_blob("whole", request)
    for stage_model in ("text_encoding", "denoising"):
        blob = stages[stage_model].run(blob)
    assert_latents(blob, reference, request)
    pictures = load(stages["decoding"].run(blob))["pictures"].int()
    assert (pictures - torch.from_numpy(reference.pictures(request)).int()).abs().max() <= 1


def test_every_stage_adds_what_it_measured(stages: dict[str, Caller]) -> None:
    blob = make_blob("timed", make_request(num_inference_steps=3))
    for caller in stages.values():
        blob = caller.run(blob)
    timings = read_state(blob).timings
    assert list(timings) == ["text_encoding", "denoising", "decoding"]
    assert all(timing.run_s > 0 and timing.queue_s >= 0 for timing in timings.values())
    assert [len(timing.steps_s) for timing in timings.values()] == [0, 3, 0]
    assert sum(timings["denoising"].steps_s) <= timings["denoising"].run_s


def test_metrics_count_every_row_that_was_computed_once(denoising: Caller, encoded: Encoded) -> None:
    before = denoising.service.metrics()
    request = make_request(num_outputs=2, num_inference_steps=3)
    denoising.run(encoded("counted", num_outputs=2, num_inference_steps=3))
    after = denoising.service.metrics()
    assert after.batch_rows_total - before.batch_rows_total == request.num_outputs * request.num_inference_steps
    assert after.batch_tokens_total > before.batch_tokens_total


def test_a_warning_of_one_stage_is_there_behind_the_next(denoising: Caller, encoded: Encoded) -> None:
    blob = denoising.run(encoded("warned", prompt="a " * 100, max_sequence_length=8))
    assert len(read_state(blob).warnings) == 1


def test_requests_at_a_time_are_drawn_as_they_are_alone(
    denoising: Caller, encoded: Encoded, reference: Reference
) -> None:
    requests = {
        f"together-{steps}": make_request(num_inference_steps=steps, seed=steps, guidance_scale=scale)
        for steps, scale in ((3, 1.0), (20, 2.0), (7, 1.0), (12, 3.0))
    }
    blobs = {request_id: encoded(request_id, **request.to_json()) for request_id, request in requests.items()}
    futures = {request_id: denoising.send(blob) for request_id, blob in blobs.items()}
    for request_id, request in requests.items():
        assert_latents(result_of(futures[request_id]), reference, request)


def test_more_outputs_than_a_batch_has_rows_are_all_drawn(
    denoising: Caller, encoded: Encoded, reference: Reference
) -> None:
    request = make_request(num_outputs=11, num_inference_steps=2)
    assert_latents(denoising.run(encoded("many", **request.to_json())), reference, request)


# Cancels.


def test_a_running_request_is_cancelled_between_two_steps(denoising: Caller, encoded: Encoded) -> None:
    future = denoising.send(encoded("cancelled", num_inference_steps=FOREVER))
    denoising.progress("cancelled", 2)
    assert denoising.cancel("cancelled") == 1
    error = error_of(future)
    assert isinstance(error, RequestCancelledError)
    assert "after" in str(error)


def test_a_request_is_cancelled_before_it_has_begun(denoising: Caller, encoded: Encoded) -> None:
    running = denoising.send(encoded("in-front", num_inference_steps=FOREVER))
    waiting = denoising.send(encoded("waiting", height=64, num_inference_steps=FOREVER))
    denoising.progress("in-front", 1)
    denoising.cancel("waiting")
    assert isinstance(error_of(waiting), RequestCancelledError)
    assert not running.done()
    denoising.cancel("in-front")
    assert isinstance(error_of(running), RequestCancelledError)


def test_cancelling_what_is_not_here_is_no_error(denoising: Caller) -> None:
    assert denoising.cancel("never-heard-of") == 0


def test_a_cancel_leaves_the_rest_of_the_batch_alone(denoising: Caller, encoded: Encoded, reference: Reference) -> None:
    request = make_request(num_inference_steps=60, seed=5)
    kept = denoising.send(encoded("kept", **request.to_json()))
    gone = denoising.send(encoded("gone", num_inference_steps=FOREVER))
    denoising.progress("gone", 3)
    denoising.cancel("gone")
    assert isinstance(error_of(gone), RequestCancelledError)
    assert_latents(result_of(kept), reference, request)


# Progress and previews.


def test_progress_counts_up_to_the_end(denoising: Caller, encoded: Encoded) -> None:
    future = denoising.send(encoded("watched", num_inference_steps=40))
    steps = [0]
    while not (progress := denoising.progress("watched", steps[-1])[0]).ended:
        assert progress.total == 40
        assert progress.elapsed_s > 0
        steps.append(progress.step)
    assert steps == sorted(set(steps))
    assert steps[-1] <= 40
    result_of(future)


def test_progress_of_a_request_that_is_not_here_has_ended(denoising: Caller) -> None:
    progress, preview = denoising.progress("never-heard-of", 0)
    assert progress.ended
    assert preview is None


def test_progress_can_be_asked_for_before_the_first_step(denoising: Caller, encoded: Encoded) -> None:
    future = denoising.send(encoded("early", num_inference_steps=FOREVER))
    progress, _ = denoising.progress("early", -1)
    assert (progress.total, progress.ended) == (FOREVER, False)
    denoising.cancel("early")
    error_of(future)


def test_whoever_watches_a_cancelled_request_is_told_that_it_ended(denoising: Caller, encoded: Encoded) -> None:
    future = denoising.send(encoded("left", num_inference_steps=FOREVER))
    watcher: Future[Any] = Future()
    denoising.service.submit(write_progress_query(ProgressQuery("left", FOREVER - 1)), watcher.set_result)
    denoising.cancel("left")
    error_of(future)
    assert read_progress(watcher.result(60))[0].ended


def test_a_preview_comes_with_the_progress_and_decodes(stages: dict[str, Caller], encoded: Encoded) -> None:
    denoising = stages["denoising"]
    future = denoising.send(encoded("previewed", num_inference_steps=FOREVER, preview_interval=3, output_format="png"))
    step, preview = 0, None
    while preview is None:
        progress, preview = denoising.progress("previewed", step)
        step = progress.step
    denoising.cancel("previewed")
    error_of(future)
    decoded = load(stages["decoding"].run(preview))
    assert decoded["media.0"].numpy().tobytes().startswith(b"\x89PNG")


def test_no_preview_comes_unasked(denoising: Caller, encoded: Encoded) -> None:
    future = denoising.send(encoded("unasked", num_inference_steps=30))
    step, ended = 0, False
    while not ended:
        progress, preview = denoising.progress("unasked", step)
        assert preview is None
        step, ended = progress.step, progress.ended
    result_of(future)


# What is refused.


def test_an_id_that_runs_is_refused_and_goes_on_running(denoising: Caller, encoded: Encoded) -> None:
    blob = encoded("twice", num_inference_steps=FOREVER)
    first = denoising.send(blob)
    error = error_of(denoising.send(blob))
    assert isinstance(error, InvalidRequestError)
    assert "'twice'" in str(error)
    assert not first.done()
    denoising.cancel("twice")
    error_of(first)


def test_an_id_may_be_used_again_when_its_request_has_ended(
    denoising: Caller, encoded: Encoded, reference: Reference
) -> None:
    denoising.run(encoded("again", prompt="two black cats"))
    request = make_request(prompt="a lighthouse at dusk")
    assert_latents(denoising.run(encoded("again", **request.to_json())), reference, request)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(denoising: Caller, encoded: Encoded) -> None:
    blobs = [encoded(f"full-{index}", num_inference_steps=FOREVER) for index in range(MAX_QUEUE_SIZE + 1)]
    futures = [denoising.send(blob) for blob in blobs]
    assert isinstance(error_of(futures[-1]), QueueFullError)
    denoising.cancel("full-0")
    error_of(futures[0])
    last = denoising.send(encoded("room", num_inference_steps=1))
    result_of(last)
    for index in range(1, MAX_QUEUE_SIZE):
        denoising.cancel(f"full-{index}")
        error_of(futures[index])


@pytest.mark.parametrize("blob", [b"", b"x" * 7, b"\x93NUMPY" * 10, bytes(1000)], ids=len)
def test_bytes_that_are_no_state_are_an_invalid_request(denoising: Caller, blob: bytes) -> None:
    assert isinstance(error_of(denoising.send(blob)), InvalidRequestError)


# Requests that fail on the ranks.


def wrong_state(request_id: str, tensors: dict[str, torch.Tensor]) -> bytes:
    return save(tensors, RequestState(request_id, make_request(num_inference_steps=12)).metadata())


EMBEDS, POOLED = torch.zeros(1, 24, 32), torch.zeros(1, 32)
WRONG = {
    "no embeddings": {},
    "no pooled embeddings": {"prompt_embeds": EMBEDS},
    "no sequence": {"pooled_prompt_embeds": POOLED},
    "wrong length": {"prompt_embeds": torch.zeros(1, 25, 32), "pooled_prompt_embeds": POOLED},
    "wrong width": {"prompt_embeds": torch.zeros(1, 24, 33), "pooled_prompt_embeds": POOLED},
    "wrong rank": {"prompt_embeds": torch.zeros(24, 32), "pooled_prompt_embeds": POOLED},
    "two prompts": {"prompt_embeds": torch.zeros(2, 24, 32), "pooled_prompt_embeds": torch.zeros(2, 32)},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_request_that_fails_on_the_rank_fails_alone(
    denoising: Caller, encoded: Encoded, reference: Reference, name: str
) -> None:
    """It shares its first batch with a good request, in front of it in the queue."""
    request = make_request(num_inference_steps=12, seed=3)
    good_blob = encoded(f"good beside {name}", **request.to_json())
    bad = denoising.send(wrong_state(f"bad {name}", WRONG[name]))
    good = denoising.send(good_blob)
    assert isinstance(error_of(bad), DiffusionError)
    assert_latents(result_of(good), reference, request)


def test_embeddings_that_are_not_finite_fail_their_request_alone(
    denoising: Caller, encoded: Encoded, reference: Reference
) -> None:
    request = make_request(num_inference_steps=12, seed=3)
    good_blob = encoded("beside nan", **request.to_json())
    tensors = {"prompt_embeds": EMBEDS * float("nan"), "pooled_prompt_embeds": POOLED}
    state = RequestState("nan", make_request(num_inference_steps=4))
    bad, good = denoising.send(save(tensors, state.metadata())), denoising.send(good_blob)
    assert isinstance(error_of(bad), StageError)
    assert_latents(result_of(good), reference, request)


def test_a_state_whose_body_is_cut_off_fails_alone(denoising: Caller, encoded: Encoded) -> None:
    blob = encoded("cut")
    assert isinstance(error_of(denoising.send(blob[:-10])), DiffusionError)
    denoising.run(blob)


def test_latents_of_another_size_fail_in_decoding_alone(stages: dict[str, Caller], encoded: Encoded) -> None:
    good = stages["denoising"].run(encoded("to decode"))
    bad = save({"latents": torch.zeros(1, 7, 16)}, RequestState("undecodable", make_request()).metadata())
    futures = [stages["decoding"].send(blob) for blob in (bad, good)]
    assert isinstance(error_of(futures[0]), DiffusionError)
    assert "pictures" in load(result_of(futures[1]))


# What would break the thread that all requests share. These come last: where one of them fails, the service is gone.


def test_an_id_may_be_used_again_right_after_a_cancel(
    denoising: Caller, encoded: Encoded, reference: Reference
) -> None:
    """Ticks of the cancelled request are still at the ranks then, and must not count for the new one."""
    request = make_request(num_inference_steps=1, seed=4)
    first, second = encoded("reborn", num_inference_steps=FOREVER), encoded("reborn", **request.to_json())
    for _ in range(10):
        old = denoising.send(first)
        denoising.progress("reborn", 1)
        denoising.cancel("reborn")
        new = denoising.send(second)
        assert isinstance(error_of(old), RequestCancelledError)
        assert_latents(result_of(new), reference, request)


def test_a_caller_that_raises_does_not_harm_the_others(denoising: Caller, encoded: Encoded) -> None:
    """A response sender raises when its client has gone away."""

    def raise_error(answer: object) -> None:
        raise RuntimeError("the client is gone")

    denoising.service.submit(encoded("gone away"), raise_error)
    denoising.run(encoded("after it"))


@pytest.mark.parametrize(
    "changed", [{"num_outputs": "two"}, {"num_outputs": 0}, {"num_inference_steps": None}, {"height": "32"}], ids=str
)
def test_a_state_with_values_of_the_wrong_kind_does_not_harm_the_others(
    denoising: Caller, encoded: Encoded, changed: dict[str, Any]
) -> None:
    values = json.loads(RequestState("odd", make_request()).metadata()[STATE])
    values["request"] |= changed
    header = json.dumps({"__metadata__": {STATE: json.dumps(values)}}).encode()
    assert isinstance(error_of(denoising.send(len(header).to_bytes(8, "little") + header)), InvalidRequestError)
    denoising.run(encoded("after odd values"))
