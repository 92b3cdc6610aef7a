"""Every error of the client, divided by who can act on it.

DiffusionClientError
├── InvalidRequestError      you: change the request
├── ModelNotFoundError       you: name a model that this server has
├── RequestTimeoutError      you: allow more time, or ask for less; the request was taken back
├── DeadlineExceededError    you: allow more time, or ask for less; the server could not meet deadline_s
├── RequestCancelledError    you or the server's operator: the request was taken back before it was finished
├── ServerUnavailableError   load, start-up, network: try again later
└── ServerError              the server's operator: its log says more

An argument that cannot be put on the wire at all (a prompt that is no text, a seed of more than 64 bits) is a plain
TypeError or ValueError, raised before anything is sent.
"""

from __future__ import annotations


class DiffusionClientError(Exception):
    """Base of all errors of a request; `str(error)` is the server's message, word for word, where it sent one."""

    def __init__(self, message: str, *, status: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        """The gRPC status ("INVALID_ARGUMENT") or HTTP status ("400") that came with the message, if one did."""
        self.request_id = request_id
        """The id under which the server's log knows the request."""


class InvalidRequestError(DiffusionClientError):
    """The server does not allow what was asked; the message says what it allows."""


class ModelNotFoundError(DiffusionClientError):
    """The server has no model of that name."""


class RequestTimeoutError(DiffusionClientError):
    """The answer did not come within `timeout_s`."""


class DeadlineExceededError(DiffusionClientError):
    """The server could not meet `deadline_s`: it refused the request at once, or dropped it later."""


class RequestCancelledError(DiffusionClientError):
    """The request was cancelled before it was finished."""


class ServerUnavailableError(DiffusionClientError):
    """The server cannot be reached, is still loading, is going away, or has too much to do."""


class ServerError(DiffusionClientError):
    """The server failed while it worked on the request."""


# Triton has no status by which a model can say this: the message begins with it, under whatever status.
_DEADLINE_EXCEEDED_PREFIX = "DEADLINE_EXCEEDED: "

_ERRORS: dict[str, type[DiffusionClientError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "400": InvalidRequestError,
    "UNIMPLEMENTED": InvalidRequestError,
    "501": InvalidRequestError,
    "NOT_FOUND": ModelNotFoundError,
    "404": ModelNotFoundError,
    "DEADLINE_EXCEEDED": RequestTimeoutError,
    "504": RequestTimeoutError,
    "CANCELLED": RequestCancelledError,
    "499": RequestCancelledError,
    "UNAVAILABLE": ServerUnavailableError,
    "RESOURCE_EXHAUSTED": ServerUnavailableError,
    "503": ServerUnavailableError,
    "429": ServerUnavailableError,
}

# Triton sends some errors without their status, or all under one: see the callers of `error_from_message`.
_PHRASES: dict[str, type[DiffusionClientError]] = {
    "unknown model": ModelNotFoundError,
    "is not healthy": ServerError,
    "is not ready": ServerUnavailableError,
    "try again": ServerUnavailableError,
    "is full": ServerUnavailableError,
    "cancelled": RequestCancelledError,
}


def error_from_status(status: str, message: str, request_id: str | None = None) -> DiffusionClientError:
    """The exception for a gRPC status name or an HTTP status number."""
    error = DeadlineExceededError if is_deadline_exceeded(message) else _ERRORS.get(status, ServerError)
    return error(message, status=status, request_id=request_id)


def error_from_message(
    message: str, default: type[DiffusionClientError], request_id: str | None = None
) -> DiffusionClientError:
    """The exception for an error whose status cannot be trusted: `default`, unless the message is one we know."""
    if is_deadline_exceeded(message):
        return DeadlineExceededError(message, request_id=request_id)
    known = (error for phrase, error in _PHRASES.items() if phrase in message)
    return next(known, default)(message, request_id=request_id)


def is_deadline_exceeded(message: str) -> bool:
    """Whether the server says that it could not meet `deadline_s`; this goes before every other rule."""
    return message.startswith(_DEADLINE_EXCEEDED_PREFIX)
