"""Embeddings of prompts that come again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from checkpoints.requests import make_blob, make_request
from checkpoints.services import Caller, run_service
from triton_diffusion.families.base import EncodedPrompt
from triton_diffusion.stages.prompt_cache import PromptCache
from triton_diffusion.state import read_state


def encoded(value: float, size: int = 25) -> EncodedPrompt:
    """4 bytes times `size`."""
    return EncodedPrompt({"prompt_embeds": torch.full((1, size), value)})


def test_what_was_put_in_comes_out() -> None:
    cache = PromptCache(1000)
    cache.put("a", encoded(1.0))
    found = cache.get("a")
    assert found is not None
    assert found.conditioning["prompt_embeds"].eq(1.0).all()
    assert cache.get("b") is None


def test_it_never_holds_more_bytes_than_it_may() -> None:
    cache = PromptCache(250)
    for number in range(100):
        cache.put(number, encoded(float(number)))
        assert cache.size_bytes <= 250
    assert [number for number in range(100) if cache.get(number) is not None] == [98, 99]


def test_what_was_used_last_stays() -> None:
    cache = PromptCache(200)
    cache.put("a", encoded(1.0))
    cache.put("b", encoded(2.0))
    cache.get("a")
    cache.put("c", encoded(3.0))
    assert cache.get("a") is not None
    assert cache.get("b") is None


@pytest.mark.parametrize("max_bytes", [0, 99])
def test_what_is_larger_than_the_cache_is_not_kept(max_bytes: int) -> None:
    cache = PromptCache(max_bytes)
    cache.put("a", encoded(1.0))
    assert cache.get("a") is None
    assert cache.size_bytes == 0


def test_a_row_of_a_batch_does_not_keep_the_batch_alive() -> None:
    batch = torch.zeros(1000, 25)
    cache = PromptCache(1000)
    cache.put("a", EncodedPrompt({"prompt_embeds": batch[:1]}))
    found = cache.get("a")
    assert found is not None
    assert found.conditioning["prompt_embeds"].untyped_storage().nbytes() == 100


# In the stage.


@pytest.fixture(scope="module")
def text_encoding(flux_checkpoint: Path) -> Iterator[Caller]:
    with run_service("text_encoding", flux_checkpoint) as caller:
        yield caller


def hits_and_lookups(caller: Caller) -> tuple[int, int]:
    metrics = caller.service.metrics()
    return metrics.prompt_cache_hits_total, metrics.prompt_cache_lookups_total


def test_a_prompt_that_comes_again_is_found_and_the_same(text_encoding: Caller) -> None:
    hits, lookups = hits_and_lookups(text_encoding)
    request = make_request(prompt="a red circle", negative_prompt="dark", guidance_scale=2.0)
    first, second = (load(text_encoding.run(make_blob(name, request))) for name in ("first", "second"))
    assert hits_and_lookups(text_encoding) == (hits + 2, lookups + 4)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_length_is_another_encoding(text_encoding: Caller) -> None:
    for length in (16, 24):
        blob = text_encoding.run(make_blob(f"length-{length}", make_request(max_sequence_length=length)))
        assert load(blob)["prompt_embeds"].shape[1] == length


def test_a_warning_comes_with_every_answer(text_encoding: Caller) -> None:
    request = make_request(prompt="a " * 100, max_sequence_length=8)
    warnings = [read_state(text_encoding.run(make_blob(name, request))).warnings for name in ("cut-1", "cut-2")]
    assert warnings[0] == warnings[1]
    assert len(warnings[0]) == 1


def test_the_warm_up_leaves_nothing_in_the_cache_and_in_its_counts(flux_checkpoint: Path) -> None:
    with run_service("text_encoding", flux_checkpoint, prompt_cache_bytes=10**6) as caller:
        assert hits_and_lookups(caller) == (0, 0)
        caller.run(make_blob("first", make_request(prompt="warm-up 1")))
        assert hits_and_lookups(caller) == (0, 1)
