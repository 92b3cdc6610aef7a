"""Reading JSON that a person wrote: what is wrong is said in full."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from triton_diffusion.errors import ConfigurationError, nearest_name_hint

_HERE = Path(__file__).parent


def named_or_file(what: str, given: str, built_in_file: str) -> tuple[str, Any]:
    """The content of a built-in name, or of a file; and a name for messages.

    Raises:
        ConfigurationError: it is neither, or no JSON.
    """
    built_in = json.loads((_HERE / built_in_file).read_text())
    if given in built_in:
        return f"{what} {given}", built_in[given]
    path = Path(given)
    try:
        return str(path), json.loads(path.read_text())
    except FileNotFoundError:
        hint = nearest_name_hint(given, built_in)
        raise ConfigurationError(
            f"{what} {given!r} is neither built in nor a file{hint}; "
            f"give {', '.join(built_in)} or the path of a JSON file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{what}: {path} cannot be read ({error}); give a JSON file") from None
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{path} is not JSON ({error}); mend it there") from None


def check_keys(where: str, given: Any, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """`given` as an object that has all of the required keys and no unknown one.

    Raises:
        ConfigurationError: it is not.
    """
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{where}: {given!r} must be a JSON object with {', '.join(required)}")
    known = [*required, *optional]
    for key in given:
        if key not in known:
            raise ConfigurationError(
                f"{where}: {key!r} is not known{nearest_name_hint(key, known)}; known ones are {', '.join(known)}"
            )
    for key in required:
        if key not in given:
            raise ConfigurationError(f"{where}: {key!r} is missing; give all of {', '.join(required)}")
    return dict(given)


def number(where: str, value: Any, *, whole: bool = False) -> float:
    """`value` as a number above 0.

    Raises:
        ConfigurationError: it is not.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf") or (whole and value != int(value)):
        raise ConfigurationError(f"{where}={value!r} must be a {'whole ' if whole else ''}number above 0; change it")
    return float(value)
