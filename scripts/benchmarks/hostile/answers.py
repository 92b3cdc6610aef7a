"""What came back, in one word, and what must never come back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

DOCUMENTED = frozenset(
    {
        *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE", "CANCELLED", "UNIMPLEMENTED"),
        *("HTTP 200", "HTTP 400", "HTTP 404", "HTTP 405", "HTTP 499", "HTTP 501", "HTTP 503"),
        *("error in a stream", "went away", "HTTP 500, no JSON"),
    }
)
"""Answers to a request that is well-formed for KServe's protocols, whatever is in it."""

UNREADABLE = DOCUMENTED | {
    # What the front ends of Triton say of bytes that they cannot read.
    *("INTERNAL", "UNKNOWN", "HTTP 411", "HTTP 413", "HTTP 414", "HTTP 415", "HTTP 500", "closed", "waits for more"),
    *("RESOURCE_EXHAUSTED", "OUT_OF_RANGE"),
}
"""Answers to what is no request at all."""

FROM_STAGES = DOCUMENTED | {"INTERNAL", "HTTP 500"}
"""Answers to states that carry the key of the server's own models: they may say that a stage failed on one."""

_OF_JSON_READER = re.compile(r"Unable to parse|failed to parse|Failed to parse")
"""Triton 24.10 says 500 where its front end cannot read the JSON, before any model has heard of it."""
_INSIDE = re.compile(
    r'Traceback|File "|site-packages|\.pyc?\b|(?<!/v2)/(home|tmp|usr|root|opt|work|var|dev|proc)/|\nAt:'
)


@dataclass(frozen=True)
class Answer:
    """An answer's class, and its message where it is an error."""

    kind: str
    message: str = ""

    def is_clean(self, sent: str = "") -> bool:
        """Whether the message tells nothing of the server's inside; what we have sent may come back."""
        found = _INSIDE.search(self.message)
        return found is None or found.group() in sent


def http_answer(status: int, body: bytes) -> Answer:
    """Of a whole HTTP response; a stream of events carries its error in one of them."""
    text = body.decode(errors="replace")
    if status == 200:
        for line in text.splitlines():
            if line.startswith(("data:", "{")) and (error := _error_in(line.removeprefix("data:"))):
                return Answer("error in a stream", error)
        return Answer("HTTP 200")
    message = _error_in(text) or text
    if status == 500 and _OF_JSON_READER.match(message):
        return Answer("HTTP 500, no JSON", message)
    return Answer(f"HTTP {status}", message)


def _error_in(text: str) -> str:
    try:
        content = json.loads(text)
    except ValueError:
        return ""
    return str(content.get("error", "")) if isinstance(content, dict) else ""
