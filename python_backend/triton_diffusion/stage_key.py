"""What tells a call of the chain from that of a client: Triton opens every model to clients, the stages too.

Who may call a stage may cancel any request, see its previews, and ask for more than the limits of the chain. So a call
carries a key, which the models of one tritonserver share and nobody else has.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from functools import cache

from triton_diffusion.errors import ConfigurationError, InvalidRequestError

VARIABLE = "TRITON_DIFFUSION_STAGE_KEY"
"""Environment variable of tritonserver with a key of the operator's choice."""
PARAMETER = "stage_key"
"""Request parameter that carries the key."""


def key_of_server(pid: int) -> str:
    """The key of the models of a tritonserver: the operator's, else one derived from where its memory lies.

    The kernel places a process's code, libraries and stack at random, and shows /proc/PID/auxv, which tells where, to
    processes of the same user only. So all models find the key without a file that someone would have to remove.

    Raises:
        ConfigurationError: the kernel does not show it.
    """
    if given := os.environ.get(VARIABLE):
        return given
    try:
        with open(f"/proc/{pid}/auxv", "rb") as file:
            return hashlib.sha256(b"stage key of triton-diffusion" + file.read()).hexdigest()
    except OSError as error:
        raise ConfigurationError(
            f"/proc/{pid}/auxv of the server cannot be read ({error.strerror}), from which models derive the key of "
            f"their calls; set {VARIABLE} in tritonserver's environment to a random text"
        ) from error


@cache
def own_key() -> str:
    """The key, for a model of the server that is our parent process."""
    return key_of_server(os.getppid())


def check_key(parameters: str) -> None:
    """Check the request parameters (JSON text) of a call; raises InvalidRequestError unless they carry the key."""
    given = str(json.loads(parameters or "{}").get(PARAMETER, ""))
    if not hmac.compare_digest(given.encode(errors="replace"), own_key().encode()):
        raise InvalidRequestError(
            "a stage's state is taken from the models of this server only; send requests to the model diffusion or "
            "diffusion_stream"
        )
