"""Every error of the server, divided by who can act on it.

DiffusionError
├── InvalidRequestError      the caller: this request can never succeed
├── ResourceExhaustedError   the caller: it does not fit in the memory, and would not the next time
├── RequestCancelledError    the caller: took the request back
├── ConfigurationError       the operator: flags, config.pbtxt, checkpoint folder
├── QueueFullError           load: come back later
├── DeadlineExceededError    load: not by then; allow more time or ask for less
├── ShuttingDownError        load: this server is going away, another may answer
├── StageError               us: a stage raised while it ran this request
└── WorkerGroupError         us: the processes of a stage died or could not start

Each class names its Triton status code (an attribute of `TritonError` in the Python backend) and the HTTP status that
Triton's front end makes of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class DiffusionError(Exception):
    """Base of all errors that a caller may be shown; the message says what was given, what is allowed, what to do."""

    MESSAGE_PREFIX = ""
    """Stands before the message on its way to a caller, where Triton has no code that says it."""
    triton_code = "INTERNAL"
    http_status = 500


class InvalidRequestError(DiffusionError):
    """The request asks for something that this checkpoint or this deployment does not allow."""

    triton_code = "INVALID_ARG"
    http_status = 400


class ResourceExhaustedError(DiffusionError):
    """A single picture or video of this size does not fit in the memory of the device.

    A model has no such code to give in Triton, so the message carries it (`MESSAGE_PREFIX`). It would fail again, so it
    is none of those that clients try again.
    """

    MESSAGE_PREFIX = "RESOURCE_EXHAUSTED: "
    triton_code = "INVALID_ARG"
    http_status = 400


class RequestCancelledError(DiffusionError):
    """The caller cancelled the request or went away before it was finished."""

    triton_code = "CANCELLED"
    http_status = 499


class ConfigurationError(DiffusionError):
    """A flag, a parameter of config.pbtxt or the checkpoint folder is wrong; nothing is served until it is mended."""


class QueueFullError(DiffusionError):
    """The admission queue of a stage is full."""

    triton_code = "UNAVAILABLE"
    http_status = 503


class DeadlineExceededError(DiffusionError):
    """The request cannot be finished by its deadline.

    A model has no such code to give in Triton, so the message carries it (`MESSAGE_PREFIX`).
    """

    MESSAGE_PREFIX = "DEADLINE_EXCEEDED: "
    triton_code = "UNAVAILABLE"
    http_status = 503


class ShuttingDownError(DiffusionError):
    """The stage is being unloaded."""

    triton_code = "UNAVAILABLE"
    http_status = 503


class StageError(DiffusionError):
    """A stage raised an exception while it ran this request; other requests are not affected."""


class WorkerGroupError(DiffusionError):
    """The rank processes of a stage died or did not start."""

    triton_code = "UNAVAILABLE"
    http_status = 503


_BY_NAME = {
    error.__name__: error
    for error in (
        InvalidRequestError,
        ResourceExhaustedError,
        RequestCancelledError,
        ConfigurationError,
        QueueFullError,
        DeadlineExceededError,
        ShuttingDownError,
        StageError,
        WorkerGroupError,
    )
}


def to_wire(error: BaseException) -> tuple[str, str]:
    """The class name and message under which `error` crosses a process boundary.

    An exception from outside our tree is a bug or a failing device: it travels as StageError, its type in the message.
    """
    if isinstance(error, DiffusionError):
        return type(error).__name__, str(error)
    return StageError.__name__, f"{type(error).__name__}: {error}"


# A traceback of Python, of the Python backend, or of torch's C++ code; and a path of two parts or more.
_TRACEBACK = re.compile(r"\s*(?:Traceback \(most recent call last\)|\n\s*At:\n|Exception raised from ).*", re.DOTALL)
_PATH = re.compile(r"(?<![\w./:])(?:/[\w.@+~-]+){2,}/?")


_LONGEST_MESSAGE_BYTES = 2000


def caller_message(error: DiffusionError) -> str:
    """The message of an error as a caller may see it: without tracebacks and paths of the server.

    What is wrong with a request is told in the caller's own words, and these stay, but for what is too long for gRPC:
    it carries a message in a header.
    """
    text = str(error) if isinstance(error, InvalidRequestError) else without_inside(str(error))
    encoded = text.encode(errors="replace")
    if len(encoded) <= _LONGEST_MESSAGE_BYTES:
        return text
    return encoded[:_LONGEST_MESSAGE_BYTES].decode(errors="ignore") + "..."


def without_inside(text: str) -> str:
    """A text without tracebacks and paths."""
    return _PATH.sub("<path>", _TRACEBACK.sub("", text))


def is_wire_name(name: str) -> bool:
    """Whether `name` is one that `to_wire` gives."""
    return name in _BY_NAME


def from_wire(name: str, message: str) -> DiffusionError:
    """The error that `to_wire` took apart."""
    return _BY_NAME.get(name, StageError)(message)


def nearest_name_hint(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for a name that is close to a known one, else an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
