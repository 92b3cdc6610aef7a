"""A file that was sent as base64 text, as JSON over HTTP has to."""

from __future__ import annotations

import base64
import binascii
import re

from triton_diffusion.errors import InvalidRequestError

EXPECTED = (
    "expected a PNG, JPEG or WebP file or base64 text of one; "
    "no URL and no path is opened: read the file and send its content"
)

_SEEN_BYTES = 64
"""Of the beginning: tells text from a file, and is shown in messages."""
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]+")
_LINE_BREAKS = b"\t\n\r"
_URL = re.compile(rb"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(rb"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
_PATH = re.compile(rb"[^\n]*\.\w{1,5}|(?:~|\.{0,2})[/\\][^\n]*|[a-z]:[/\\][^\n]*", re.IGNORECASE)
_LONGEST_PATH_BYTES = 4096


def is_text(data: bytes) -> bool:
    """Whether `data` begins as text; the picture formats begin with other bytes."""
    return _TEXT.fullmatch(data[:_SEEN_BYTES]) is not None


def file_of_text(data: bytes, name: str, max_bytes: int) -> bytes:
    """The file whose base64 text `data` is, with or without `data:image/...;base64,` before it; line breaks do no harm.

    Raises:
        InvalidRequestError: it is not base64, or more than `max_bytes` of it.
    """
    text = data.strip()
    prefix = _DATA_URL.match(text)
    encoded = text[prefix.end() if prefix else 0 :].translate(None, _LINE_BREAKS)
    check_file_bytes(len(encoded.rstrip(b"=")) * 3 // 4, name, max_bytes)
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise InvalidRequestError(f"{name} is {describe_text(text)} ({error}); {EXPECTED}") from error


def check_file_bytes(size_bytes: int, name: str, max_bytes: int) -> None:
    """Refuse a file that is too large.

    Raises:
        InvalidRequestError: it has more than `max_bytes`.
    """
    if size_bytes > max_bytes:
        raise InvalidRequestError(
            f"{name} is a file of {size_bytes} bytes; expected at most {max_bytes}; "
            "send a smaller or more compressed picture"
        )


def describe_text(text: bytes) -> str:
    """What a text is that turned out to hold no picture."""
    text = text.strip()
    start = ascii(text[:_SEEN_BYTES].decode("ascii", "replace")) + ("..." if len(text) > _SEEN_BYTES else "")
    if text[:5].lower() == b"data:":
        return f"the data URL {start} that holds no base64 text of a picture"
    if _URL.match(text):
        return f"the URL {start}"
    if len(text) <= _LONGEST_PATH_BYTES and _PATH.fullmatch(text):
        return f"the path {start}"
    return f"text of {len(text)} characters, {start}, that is not base64 of a picture"
