"""The exception tree, and errors on their way across a process boundary."""

from __future__ import annotations

import pytest

from triton_diffusion import errors
from triton_diffusion.errors import (
    ConfigurationError,
    DiffusionError,
    InvalidRequestError,
    StageError,
    WorkerGroupError,
    caller_message,
    from_wire,
    nearest_name_hint,
    to_wire,
)

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DiffusionError)]
CONCRETE = [kind for kind in TREE if kind is not DiffusionError]
# TRITONSERVER_Error_Code to HTTP status, as Triton's HTTP front end maps them.
HTTP_STATUS = {"INTERNAL": 500, "INVALID_ARG": 400, "UNAVAILABLE": 503, "CANCELLED": 499}


def test_the_tree_drawn_at_the_top_of_the_module_names_every_class() -> None:
    assert errors.__doc__ is not None
    drawn = {line.split()[1] for line in errors.__doc__.splitlines() if line.startswith(("├", "└"))}
    assert drawn == {kind.__name__ for kind in CONCRETE}


@pytest.mark.parametrize("kind", TREE)
def test_every_error_has_a_triton_code_and_the_http_status_that_triton_makes_of_it(kind: type[DiffusionError]) -> None:
    assert kind.http_status == HTTP_STATUS[kind.triton_code]


@pytest.mark.parametrize("kind", CONCRETE)
def test_an_error_keeps_class_and_message_across_a_process_boundary(kind: type[DiffusionError]) -> None:
    back = from_wire(*to_wire(kind("prompt is empty")))
    assert type(back) is kind
    assert str(back) == "prompt is empty"


def test_a_foreign_exception_arrives_as_a_stage_error_with_its_type() -> None:
    back = from_wire(*to_wire(ZeroDivisionError("division by zero")))
    assert type(back) is StageError
    assert str(back) == "ZeroDivisionError: division by zero"


def test_an_unknown_class_name_arrives_as_a_stage_error() -> None:
    assert type(from_wire("SystemExit", "x")) is StageError


def test_a_close_name_is_offered() -> None:
    assert nearest_name_hint("promt", ["prompt", "seed"]) == " (did you mean prompt?)"


def test_no_name_is_offered_for_one_that_is_like_none() -> None:
    assert nearest_name_hint("zzz", ["prompt", "seed"]) == ""


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("OSError: cannot read /srv/models/flux/vae/config.json", "OSError: cannot read <path>"),
        ("ValueError: no\n\nAt:\n  /srv/models/1/model.py(7): execute\n", "ValueError: no"),
        ("RuntimeError: no\nTraceback (most recent call last):\n  File x", "RuntimeError: no"),
        ("c10::Error: no\nException raised from f at /src/a.cpp:1 (most recent call first):", "c10::Error: no"),
        (
            "rank 0 failed after 3/4 of 64x64 at 1.5 it/s and/or later",
            "rank 0 failed after 3/4 of 64x64 at 1.5 it/s and/or later",
        ),
    ],
)
def test_a_caller_sees_neither_tracebacks_nor_paths_of_the_server(message: str, shown: str) -> None:
    for error_class in (StageError, WorkerGroupError, ConfigurationError):
        assert caller_message(error_class(message)) == shown


def test_a_caller_sees_the_path_that_it_has_sent_itself() -> None:
    assert caller_message(InvalidRequestError("image is the path '/etc/passwd'")) == "image is the path '/etc/passwd'"


def test_a_long_message_is_cut_at_a_whole_character() -> None:
    """gRPC has room for 8 KB of it, in which a byte that is not ASCII takes three."""
    message = caller_message(InvalidRequestError("ü" * 20_000))
    assert message == "ü" * 1000 + "..."
