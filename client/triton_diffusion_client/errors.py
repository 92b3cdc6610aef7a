"""Every error of the client, divided by who can act on it, and which answers of a server become which error.

DiffusionClientError
├── InvalidRequestError      you: change the request
├── ResourceExhaustedError   you: ask for less; one output of this size does not fit in the server's memory
├── ModelNotFoundError       you: name a model that this server has
├── AccessDeniedError        you: show the key, or the authorization, that the server asks for
├── RequestTimeoutError      you: allow more time, or ask for less; the request was taken back
├── DeadlineExceededError    you: allow more time, or ask for less; the server could not meet deadline_s
├── RequestCancelledError    you or the server's operator: the request was taken back before it was finished
├── ServerUnavailableError   load, start-up, restart, network: the client has tried again, see `_retries`
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
        self.attempts = 1
        """How often the request was sent before the client gave it up."""


class InvalidRequestError(DiffusionClientError):
    """The server does not allow what was asked; the message says what it allows."""


class ResourceExhaustedError(DiffusionClientError):
    """A single picture or video of this size does not fit in the memory of the server's device."""


class ModelNotFoundError(DiffusionClientError):
    """The server has no model of that name."""


class AccessDeniedError(DiffusionClientError):
    """The server answers this only to who shows a key, or who has logged in."""


class RequestTimeoutError(DiffusionClientError):
    """The answer did not come within `timeout_s`."""


class DeadlineExceededError(DiffusionClientError):
    """The server could not meet `deadline_s`: it refused the request at once, or dropped it later."""


class RequestCancelledError(DiffusionClientError):
    """The request was cancelled before it was finished."""


class ServerUnavailableError(DiffusionClientError):
    """The server cannot be reached, is still loading, is going away, or has too much to do."""

    def __init__(
        self, message: str, *, status: str | None = None, request_id: str | None = None, was_connected: bool = True
    ) -> None:
        super().__init__(message, status=status, request_id=request_id)
        self.was_connected = was_connected
        """False: there was no connection to begin with: nothing listens there, or nothing that speaks the protocol."""


class ServerError(DiffusionClientError):
    """The server failed while it worked on the request."""


# Triton has no status by which a model can say these: the message begins so, under whatever status.
_PREFIXES: dict[str, type[DiffusionClientError]] = {
    "DEADLINE_EXCEEDED: ": DeadlineExceededError,
    "RESOURCE_EXHAUSTED: ": ResourceExhaustedError,
}

# What Triton 24.10 says of itself, by a part of its words, whatever the status is that comes with them.
_OF_TRITON: dict[str, type[DiffusionClientError]] = {
    # INTERNAL, 500: the process of a model (its stub) has died; of a stage's, in the words of the chain.
    "is not healthy": ServerUnavailableError,
    # NOT_FOUND, 404: a model that is unloaded at the moment, as it is while a dead stub is replaced.
    "has no available versions": ServerUnavailableError,
    # INTERNAL, 500, in the words of a chain: the same of a stage.
    "' is not ready": ServerUnavailableError,
    # UNAVAILABLE, 403: an API that needs a key.
    "is restricted, expecting header": AccessDeniedError,
}

_BY_STATUS: dict[str, type[DiffusionClientError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "400": InvalidRequestError,
    "UNIMPLEMENTED": InvalidRequestError,
    "501": InvalidRequestError,
    "NOT_FOUND": ModelNotFoundError,
    "404": ModelNotFoundError,
    "UNAUTHENTICATED": AccessDeniedError,
    "401": AccessDeniedError,
    "PERMISSION_DENIED": AccessDeniedError,
    "403": AccessDeniedError,
    "DEADLINE_EXCEEDED": RequestTimeoutError,
    "504": RequestTimeoutError,
    "CANCELLED": RequestCancelledError,
    "499": RequestCancelledError,
    "UNAVAILABLE": ServerUnavailableError,
    "RESOURCE_EXHAUSTED": ServerUnavailableError,
    "503": ServerUnavailableError,
    "502": ServerUnavailableError,
    "429": ServerUnavailableError,
}

# Triton sends some errors without their status, or all under one: see the callers of `error_from_message`.
_PHRASES: dict[str, type[DiffusionClientError]] = {
    "unknown model": ModelNotFoundError,
    "is not ready": ServerUnavailableError,
    "try again": ServerUnavailableError,
    "is full": ServerUnavailableError,
    "cancelled": RequestCancelledError,
}


def error_from_status(status: str, message: str, request_id: str | None = None) -> DiffusionClientError:
    """The exception for a gRPC status name or an HTTP status number."""
    error = _known_by_message(message) or _BY_STATUS.get(status, ServerError)
    return error(message, status=status, request_id=request_id)


def error_from_message(
    message: str, default: type[DiffusionClientError], request_id: str | None = None
) -> DiffusionClientError:
    """The exception for an error whose status cannot be trusted: `default`, unless the message is one we know."""
    by_phrase = (error for phrase, error in _PHRASES.items() if phrase in message)
    error = _known_by_message(message) or next(by_phrase, default)
    return error(message, request_id=request_id)


def is_from_a_model(message: str) -> bool:
    """Whether a model of ours says this, by how it begins; this goes before every other rule."""
    return message.startswith(tuple(_PREFIXES))


def _known_by_message(message: str) -> type[DiffusionClientError] | None:
    beginnings = (error for prefix, error in _PREFIXES.items() if message.startswith(prefix))
    parts = (error for phrase, error in _OF_TRITON.items() if phrase in message)
    return next(beginnings, None) or next(parts, None)
