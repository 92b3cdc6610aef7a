"""RequestState and the queries about it, on the wire; and whatever else arrives there."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from checkpoints.requests import make_blob, make_request
from triton_diffusion.errors import InvalidRequestError
from triton_diffusion.request import MAX_SEED, GenerationRequest
from triton_diffusion.state import (
    CANCEL,
    MAX_HEADER_BYTES,
    PROGRESS,
    STATE,
    CancelOrder,
    Progress,
    ProgressQuery,
    RequestState,
    StageTimings,
    TensorInfo,
    image_name,
    make_cancel_key,
    merge_tensors,
    read_metadata,
    read_num_cancelled,
    read_progress,
    read_stage_input,
    read_state,
    read_tensors,
    replace_metadata,
    write_cancel_order,
    write_num_cancelled,
    write_progress,
    write_progress_query,
    write_state,
)

# A lone surrogate has no UTF-8, so no caller can send one.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SECONDS = st.floats(0, 1e6)
SCALES = st.floats(0, 1000)
REQUESTS = st.builds(
    GenerationRequest,
    prompt=TEXT,
    negative_prompt=TEXT,
    height=st.integers(1, 10_000),
    width=st.integers(1, 10_000),
    num_inference_steps=st.integers(1, 200),
    guidance_scale=SCALES,
    embedded_guidance_scale=SCALES,
    seed=st.integers(0, MAX_SEED - 100),
    num_outputs=st.integers(1, 8),
    max_sequence_length=st.integers(1, 512),
    output_format=st.sampled_from(["png", "raw"]),
    output_quality=st.integers(1, 100),
    preview_interval=st.integers(0, 200),
)
STATES = st.builds(
    RequestState,
    request_id=TEXT,
    request=REQUESTS,
    timings=st.dictionaries(TEXT, st.builds(StageTimings, SECONDS, SECONDS, st.lists(SECONDS, max_size=5)), max_size=3),
    warnings=st.lists(TEXT, max_size=3),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=8,
)


def blob_with_header(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def blob_with_metadata(metadata: Any) -> bytes:
    return blob_with_header(json.dumps({"__metadata__": metadata}).encode())


def state_values(**changed: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(RequestState("r", make_request()).metadata()[STATE])
    return values | changed


def blob_with_request(**changed: Any) -> bytes:
    values = state_values()
    values["request"] |= changed
    return blob_with_metadata({STATE: json.dumps(values)})


# Round trips.


@given(STATES)
def test_a_state_survives_the_wire(state: RequestState) -> None:
    assert read_state(write_state(state)) == state


@given(st.builds(ProgressQuery, TEXT, st.integers(-1, 1000)))
def test_a_progress_query_survives_the_wire(query: ProgressQuery) -> None:
    assert read_stage_input(write_progress_query(query)) == query


@given(st.builds(CancelOrder, st.lists(TEXT), TEXT))
def test_a_cancel_order_survives_the_wire(order: CancelOrder) -> None:
    assert read_stage_input(write_cancel_order(order)) == order


@given(
    st.builds(Progress, st.integers(0, 99), st.integers(0, 99), SECONDS, st.none() | SECONDS, st.booleans()),
    st.none() | st.binary(),
)
def test_progress_survives_the_wire_with_and_without_a_preview(progress: Progress, preview: bytes | None) -> None:
    read, read_preview = read_progress(write_progress(progress, preview))
    assert read == progress
    assert read_preview == preview


def test_tensors_are_described_by_the_header_and_read_as_bytes() -> None:
    latents = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    blob = save({"latents": latents}, RequestState("r", make_request()).metadata())
    assert read_state(blob).tensor_infos == {"latents": TensorInfo("F32", (1, 2, 3))}
    assert read_tensors(blob) == {"latents": latents.tobytes()}


@given(STATES, st.dictionaries(TEXT.filter(lambda name: name != "__metadata__"), st.binary(max_size=30), max_size=3))
def test_replacing_the_metadata_keeps_the_tensors(state: RequestState, tensors: dict[str, bytes]) -> None:
    before = {name: np.frombuffer(data, np.uint8) for name, data in tensors.items()}
    blob = replace_metadata(save(before, {"old": "1"}), state.metadata())
    read = read_state(blob)
    assert dataclasses.replace(read, tensor_infos={}) == state
    assert {name: array.tobytes() for name, array in load(blob).items()} == tensors


def test_a_replaced_header_leaves_the_body_aligned() -> None:
    """safetensors wants its body at a multiple of 8 bytes."""
    for length in range(16):
        blob = replace_metadata(save({"x": np.ones(3)}), {"key": "x" * length})
        assert (8 + int.from_bytes(blob[:8], "little")) % 8 == 0


def test_a_query_is_not_a_state() -> None:
    with pytest.raises(InvalidRequestError, match="ProgressQuery"):
        read_state(write_progress_query(ProgressQuery("r", 0)))


# Whatever else arrives.


@given(st.binary(max_size=200))
def test_garbage_is_an_invalid_request_and_nothing_else(data: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read_stage_input(data)


@given(st.data())
def test_a_truncated_header_is_an_invalid_request(data: st.DataObject) -> None:
    blob = make_blob("r")
    length = data.draw(st.integers(0, 8 + int.from_bytes(blob[:8], "little") - 1))
    with pytest.raises(InvalidRequestError):
        read_stage_input(blob[:length])


@pytest.mark.parametrize("header_bytes", [0, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_length_that_cannot_be_is_an_invalid_request(header_bytes: int) -> None:
    with pytest.raises(InvalidRequestError, match="header length"):
        read_stage_input(header_bytes.to_bytes(8, "little") + b"{}")


def test_a_header_longer_than_allowed_is_not_parsed_even_if_its_bytes_are_there() -> None:
    header = json.dumps({"__metadata__": {STATE: " " * MAX_HEADER_BYTES}}).encode()
    with pytest.raises(InvalidRequestError, match="header length"):
        read_metadata(blob_with_header(header))


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe",
        b"[1, 2]",
        b"NaN",
        b'"state"',
        b"[" * 100_000,
        b'{"__metadata__": ' + b'{"a":' * 50_000,
        b'{"x": 1}',
        b'{"x": {"dtype": "F32", "shape": 3}}',
        b'{"x": {"shape": [3]}}',
        b"1" * 10_000,
    ],
    ids=lambda header: repr(header[:30]),
)
def test_a_header_that_is_no_safetensors_header_is_an_invalid_request(header: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read_stage_input(blob_with_header(header))


@given(JSON)
@example("state")
@example("progress")
@example(["cancel"])
@example({STATE: "[" * 100_000})
@example({STATE: "{}"})
@example({STATE: 5})
@example({PROGRESS: "{}"})
@example({CANCEL: "[]"})
@example({CANCEL: "7"})
def test_metadata_without_a_request_is_an_invalid_request(metadata: Any) -> None:
    with pytest.raises(InvalidRequestError):
        read_stage_input(blob_with_metadata(metadata))


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*state_values()]), JSON, min_size=1, max_size=2))
def test_a_state_with_other_values_is_read_or_is_an_invalid_request(changed: dict[str, Any]) -> None:
    try:
        state = read_state(blob_with_metadata({STATE: json.dumps(state_values(**changed))}))
    except InvalidRequestError:
        return
    assert isinstance(state.request_id, str)
    assert all(isinstance(warning, str) for warning in state.warnings)
    assert all(isinstance(timing.queue_s, int | float) for timing in state.timings.values())


@pytest.mark.parametrize(
    "changed",
    [
        {"num_outputs": 0},
        {"num_outputs": -1},
        {"num_outputs": "two"},
        {"num_outputs": 1.5},
        {"num_outputs": None},
        {"num_inference_steps": 0},
        {"num_inference_steps": "4"},
        {"num_inference_steps": float("nan")},
        {"num_inference_steps": []},
        {"height": 0},
        {"height": "32"},
        {"width": float("inf")},
        {"guidance_scale": float("nan")},
        {"guidance_scale": "2"},
        {"embedded_guidance_scale": float("inf")},
        {"guidance_scale_2": float("nan")},
        {"guidance_scale_2": "2"},
        {"seed": float("nan")},
        {"seed": None},
        {"max_sequence_length": 0},
        {"prompt": 5},
        {"prompt": None},
        {"negative_prompt": ["x"]},
        {"output_format": {}},
        {"preview_interval": -1},
        {"preview_interval": "2"},
        {"priority": 10},
        {"priority": -1},
        {"priority": "9"},
        {"deadline_s": "1"},
        {"deadline_action": "explode"},
    ],
    ids=str,
)
def test_a_state_whose_request_no_chain_would_write_is_an_invalid_request(changed: dict[str, Any]) -> None:
    """Any client may call a stage model. A wrong kind of value would break the scheduler that all requests share."""
    with pytest.raises(InvalidRequestError):
        read_state(blob_with_request(**changed))


@pytest.mark.parametrize(
    "metadata",
    [
        {PROGRESS: '{"request_id": [], "after_step": 0}'},
        {PROGRESS: '{"request_id": "r", "after_step": "0"}'},
        {PROGRESS: '{"request_id": "r", "after_step": NaN}'},
        {CANCEL: '{"request_ids": "r"}'},
        {CANCEL: '{"request_ids": [{}]}'},
        {CANCEL: '{"cancel_key": ["k"]}'},
        {STATE: json.dumps(state_values(request_id=["r"]))},
        {STATE: json.dumps(state_values(request_id=None))},
        {STATE: json.dumps(state_values(request_id="\ud800"))},
    ],
    ids=lambda metadata: str(metadata)[:60],
)
def test_a_request_id_or_step_of_the_wrong_type_is_an_invalid_request(metadata: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError):
        read_stage_input(blob_with_metadata(metadata))


# Cancelling by a caller's id.


# Tensors of several stages in one state.


def test_merged_tensors_are_those_of_both_with_the_later_metadata() -> None:
    earlier = save({"a": np.arange(3), "image.0": np.zeros((2, 2, 3), np.uint8)}, {"from": "earlier"})
    later = save({"b": np.ones(5, np.float32), "c": np.zeros((0, 2))}, {"from": "later"})
    merged = merge_tensors(earlier, later)
    assert {name: tensor.tolist() for name, tensor in load(merged).items()} == {
        "a": [0, 1, 2],
        "image.0": np.zeros((2, 2, 3)).tolist(),
        "b": [1.0] * 5,
        "c": [],
    }
    assert read_metadata(merged)[0] == {"from": "later"}


def test_a_name_in_both_is_the_later_tensor() -> None:
    merged = merge_tensors(save({"a": np.arange(3), "b": np.arange(2)}), save({"a": np.arange(9)}, {"k": "v"}))
    assert {name: len(tensor) for name, tensor in load(merged).items()} == {"a": 9, "b": 2}


def test_dropped_tensors_of_the_earlier_state_are_gone() -> None:
    earlier = save({"a": np.arange(3), "image.0": np.zeros(7), "image.1": np.zeros(7)})
    merged = merge_tensors(earlier, save({"b": np.arange(2)}, {"k": "v"}), drop="image.")
    assert set(load(merged)) == {"a", "b"}


def test_nothing_is_copied_where_the_earlier_state_adds_nothing() -> None:
    later = save({"b": np.arange(2)}, {"k": "v"})
    assert merge_tensors(save({"image.0": np.zeros(7)}), later, drop="image.") is later
    assert merge_tensors(make_blob("r"), later) is later


def test_pictures_travel_in_the_state_as_they_are() -> None:
    pictures = [np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.full((1, 3, 3), 9, np.uint8)]
    blob = make_blob("r", make_request(num_images=2), pictures)
    assert read_state(blob).request.num_images == 2
    for index, picture in enumerate(pictures):
        assert np.array_equal(load(blob)[image_name(index)], picture)


def test_a_cancel_key_needs_the_scope_as_well_as_the_id() -> None:
    keys = {make_cancel_key(scope, request_id) for scope in ("", "a", "b") for request_id in ("1", "2")}
    assert len(keys) == 6
    assert make_cancel_key("a", "1") == make_cancel_key("a", "1")
    assert make_cancel_key("a", "bc") != make_cancel_key("ab", "c")
    assert make_cancel_key("scope", "") == "", "a request without an id cannot be named"


def test_the_number_of_cancelled_requests_survives_the_wire() -> None:
    assert read_num_cancelled(write_num_cancelled(3)) == 3


# What the Triton processes import.


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "families.registry",
        "loading.checkpoint",
        "request",
        "runtime.service",
        "scheduler",
        "state",
    ],
)
def test_the_triton_processes_import_no_torch(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers")
    code = f"import sys, triton_diffusion.{module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
