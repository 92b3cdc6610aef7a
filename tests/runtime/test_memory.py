"""What does not fit in memory together runs in smaller batches, and what does not fit alone is an error of its own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load

from checkpoints.parity import assert_close
from checkpoints.requests import make_blob, make_request
from checkpoints.services import result_of, run_service
from checkpoints.stages import InProcessStages
from triton_diffusion.distributed.group import Failures, RankGroup, RanksDivergedError
from triton_diffusion.errors import DiffusionError, ResourceExhaustedError, from_wire
from triton_diffusion.runtime.calibration import keep_memory_limit, read_calibration, uncalibrated, write_calibration
from triton_diffusion.runtime.faults import VARIABLE, Faults
from triton_diffusion.runtime.memory import is_out_of_memory
from triton_diffusion.runtime.messages import AdmitRequest, RunTick
from triton_diffusion.runtime.rank_executor import RankExecutor

TOKENS = 24 + 8 * 8
"""Of a row of make_request: 24 text tokens, 32 x 32 pixels in tokens of 4 x 4."""


@pytest.fixture
def stages(flux_checkpoint: Path) -> InProcessStages:
    return InProcessStages(flux_checkpoint)


def have_memory_for(executor: RankExecutor, tokens: int) -> list[int]:
    """Let passes of more tokens run out of memory; returns a list to which the tokens of each pass are added."""
    passes: list[int] = []

    class Counting(Faults):
        @contextmanager
        def during_step(self, prompts: object, tokens: int) -> Iterator[None]:
            passes.append(tokens)
            with super().during_step([], tokens):
                yield

    executor._faults = Counting(oom_tokens=tokens)
    return passes


def admit(stages: InProcessStages, names: str, **values: object) -> list[tuple[str, int]]:
    """Requests of a row each; returns the rows."""
    for seed, name in enumerate(names):
        stages.admit("denoising", name, stages.encode(name, make_request(seed=seed, num_inference_steps=2, **values)))
    return [(name, 0) for name in names]


def test_a_batch_that_does_not_fit_is_halved_and_the_limit_is_kept(stages: InProcessStages) -> None:
    executor = stages.executors["denoising"]
    learnt: list[int] = []
    executor.on_memory_limit = learnt.append
    passes = have_memory_for(executor, 2 * TOKENS)
    rows = admit(stages, "abcde")
    first = stages.tick("denoising", rows)
    assert not first.failed
    assert first.max_batch_tokens == 2 * TOKENS
    assert [tokens // TOKENS for tokens in passes] == [5, 2, 3, 1, 2]
    assert learnt == [3 * TOKENS, 2 * TOKENS]
    passes.clear()
    second = stages.tick("denoising", rows)
    assert second.max_batch_tokens == 0, "it is said once"
    assert [tokens // TOKENS for tokens in passes] == [2, 2, 1], "what was sent before is cut as memory allows"
    executor._faults = Faults()
    for seed, (name, _) in enumerate(rows):
        undisturbed = stages.latents(make_request(seed=seed, num_inference_steps=2))
        assert_close(load(second.results[name])["latents"], undisturbed)


def test_a_row_that_does_not_fit_alone_fails_alone_and_its_size_is_named(stages: InProcessStages) -> None:
    executor = stages.executors["denoising"]
    have_memory_for(executor, 2 * TOKENS)
    rows = admit(stages, "ab")
    large = make_request(height=64, width=64, num_inference_steps=2)
    stages.admit("denoising", "large", stages.encode("large", large))
    done = stages.tick("denoising", [*rows, ("large", 0)])
    assert list(done.failed) == ["large"]
    error = from_wire(*done.failed["large"])
    assert isinstance(error, ResourceExhaustedError)
    assert str(error).startswith("64x64 (height x width, 280 tokens) does not fit in the memory of cpu in denoising")
    assert "ask for a smaller picture" in str(error)
    assert stages.tick("denoising", rows).results.keys() == {"a", "b"}


def test_the_tensors_of_a_failed_pass_are_gone_when_it_is_tried_again(
    stages: InProcessStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise = stages.family.denoise
    predict = denoise.predict
    kept: list[weakref.ref[torch.Tensor]] = []

    def predict_large(components: object, latents: torch.Tensor, *others: object) -> torch.Tensor:
        assert all(reference() is None for reference in kept), "a failed pass still has its memory"
        if len(latents) > 1:
            large = torch.zeros(1000)
            kept.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(components, latents, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(denoise, "predict", predict_large)
    rows = admit(stages, "abcd")
    # What only the garbage collector could find would come too late.
    gc.disable()
    try:
        assert not stages.tick("denoising", rows).failed
    finally:
        gc.enable()
    assert len(kept) == 3


def test_prompts_that_do_not_fit_together_are_encoded_in_halves(stages: InProcessStages) -> None:
    have_memory_for(stages.executors["text_encoding"], 2 * 24)
    for name in "abcd":
        stages.admit("text_encoding", name, make_blob(name, make_request(prompt=name)))
    done = stages.tick("text_encoding", [(name, 0) for name in "abcd"])
    assert done.results.keys() == set("abcd")
    assert done.max_batch_tokens == 2 * 24


@contextmanager
def vae_for(stages: InProcessStages, pictures: int, *, tiles_only: bool = False) -> Iterator[list[int]]:
    """An autoencoder that decodes so many pictures at a time; the list gets the size of each pass."""
    vae = stages.executors["decoding"]._plan.on_tick._components["vae"]  # type: ignore[attr-defined]
    decode = vae.decode
    passes: list[int] = []

    def decode_few(latents: torch.Tensor, **values: object) -> object:
        passes.append(len(latents))
        if len(latents) > pictures or (tiles_only and not vae.use_tiling):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents, **values)

    vae.decode = decode_few
    try:
        yield passes
    finally:
        vae.decode = decode


def test_pictures_of_a_request_that_do_not_fit_together_are_decoded_in_fewer_at_a_time(stages: InProcessStages) -> None:
    request = make_request(num_outputs=4)
    undisturbed = stages.pictures(request)
    with vae_for(stages, 1) as passes:
        pictures = stages.pictures(request)
    assert passes == [4, 2, 1, 1, 1, 1]
    assert (pictures.int() - undisturbed.int()).abs().max() <= 1


def test_a_picture_that_does_not_fit_whole_is_decoded_in_tiles_and_says_so(stages: InProcessStages) -> None:
    vae = stages.executors["decoding"]._plan.on_tick._components["vae"]  # type: ignore[attr-defined]
    blob = stages.run("denoising", "t", stages.encode("t", make_request()))
    with vae_for(stages, 1, tiles_only=True):
        result = stages.run("decoding", "t", blob)
        assert b"decoded in tiles" in result
        assert not vae.use_tiling, "other sizes are decoded whole"
    with vae_for(stages, 0), pytest.raises(ResourceExhaustedError, match=r"32x32 .* in decoding"):
        stages.run("decoding", "t", blob)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


# Several ranks.


class LeftAlone(RankGroup):
    """A rank whose peers wait for it in the middle of a pass."""

    def agree(self, failures: Failures) -> dict[str, DiffusionError]:
        if failures:
            raise RanksDivergedError("the others are elsewhere")
        return {}


def test_a_rank_that_runs_out_of_memory_alone_tells_it_to_its_successor(
    stages: InProcessStages, tmp_path: Path
) -> None:
    executor = stages.executors["denoising"]
    rows = admit(stages, "abcd")
    stages.tick("denoising", rows)
    executor._group = LeftAlone(rank=0, size=1, device=torch.device("cpu"))
    path = tmp_path / "file.json"
    executor.on_memory_limit = lambda limit: keep_memory_limit(path, "cpu", limit)
    have_memory_for(executor, TOKENS)
    with pytest.raises(RanksDivergedError):
        executor.run(RunTick(tick_id=1, rows=rows, num_steps=1))
    kept = read_calibration(path)
    assert kept == msgspec.structs.replace(uncalibrated("cpu"), memory_limit=2 * TOKENS)


def test_a_limit_is_added_to_what_was_measured_and_only_falls(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    measured = msgspec.structs.replace(uncalibrated("cpu", 500), measurements=[(500, 1.0)])
    write_calibration(path, measured)
    for limit in (300, 400, 200):
        keep_memory_limit(path, "cpu", limit)
    kept = read_calibration(path)
    assert kept is not None
    assert (kept.max_batch_tokens, kept.memory_limit) == (500, 200)


def test_ranks_agree_when_one_of_them_runs_out_of_memory(
    flux_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two ranks that share the predictions only the second has little memory; both halve the batch."""
    monkeypatch.setenv("TRITON_DIFFUSION_CACHE", str(tmp_path))
    limit = 2 * 2 * TOKENS
    monkeypatch.setenv(VARIABLE, f"oom_tokens={limit};rank=1")
    options = {"num_gpus": 2, "dp_size": 1, "enable_cfg_parallel": True, "warmup_resolutions": "none"}
    stages = InProcessStages(flux_checkpoint)
    requests = {
        name: make_request(seed=seed, num_inference_steps=20, guidance_scale=2.0) for seed, name in enumerate("abcd")
    }
    blobs = {name: stages.encode(name, request) for name, request in requests.items()}
    with run_service("denoising", flux_checkpoint, max_batch_tokens=4 * limit, **options) as caller:
        before = caller.pids()
        futures = {name: caller.send(blob) for name, blob in blobs.items()}
        for name, request in requests.items():
            assert_close(load(result_of(futures[name]))["latents"], stages.latents(request))
        assert caller.pids() == before, "no rank had to end"
        assert caller.service.metrics().max_batch_tokens == limit
    (file,) = (tmp_path / "calibration").glob("denoising-*.json")
    kept = read_calibration(file)
    assert kept is not None
    assert kept.memory_limit == limit


def test_a_request_that_is_admitted_out_of_memory_has_the_same_error(
    stages: InProcessStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    blob = stages.encode("a", make_request())
    monkeypatch.setattr(stages.family.denoise, "prepare_latents", fail)
    stages.executors["denoising"].admit(AdmitRequest(request_id="a", state=blob))
    done = stages.tick("denoising", [("a", 0)])
    assert from_wire(*done.failed["a"]).http_status == 400
    assert done.max_batch_tokens == 0
