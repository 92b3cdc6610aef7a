"""Triton's APIs that are for the operator alone: closed by a key, and used by us with it."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from urllib.parse import quote

from triton_diffusion._passed_on import read_options, restricted_apis

KEY_HEADER = "triton-diffusion-admin-key"
"""Header that carries the key over HTTP; over gRPC Triton wants "triton-grpc-protocol-" before it."""
KEY_VARIABLE = "TRITON_DIFFUSION_ADMIN_KEY"
RESTRICTED_APIS = ("model-repository", "shared-memory", "logging", "trace")
"""Triton's names of what is closed: loading and unloading models, shared memory, settings of the log and of traces."""


def restriction_arguments(key: str, others: Sequence[str]) -> list[str]:
    """The arguments of tritonserver that close the APIs, but for those that `others` close themselves."""
    arguments = []
    for flag in ("--http-restricted-api", "--grpc-restricted-protocol"):
        # Triton refuses an API that is named twice.
        taken = restricted_apis(others, flag)
        if apis := [api for api in RESTRICTED_APIS if api not in taken]:
            arguments.append(f"{flag}={','.join(apis)}:{KEY_HEADER}={key}")
    return arguments


def control_arguments(others: Sequence[str]) -> list[str]:
    """The arguments of tritonserver that let models be loaded anew, unless `others` choose another way.

    All models are loaded at the start, unless `others` name those to load, or control it all.
    """
    given = {name for name, _ in read_options(others)}
    if "--model-control-mode" in given:
        return []
    return ["--model-control-mode=explicit", *([] if "--load-model" in given else ["--load-model=*"])]


def hides_processes(mounts: str) -> bool:
    """Whether /proc keeps the arguments of a process from other users, by the lines of /proc/self/mounts.

    Triton takes the key nowhere else than in its arguments.
    """
    mounted = [line.split()[3].split(",") for line in mounts.splitlines() if line.split()[1:3] == ["/proc", "proc"]]
    # The last one lies over the others.
    options = mounted[-1] if mounted else []
    return any(option.startswith("hidepid=") and option not in ("hidepid=0", "hidepid=off") for option in options)


class AdminError(Exception):
    """The server did not do what it was told, or did not answer."""


class ServerAdmin:
    """Loads and unloads single models of a server on this machine."""

    def __init__(self, host: str, port: int, key: str) -> None:
        self._host, self._port = host, port
        self._headers = {KEY_HEADER: key}

    def state(self, model: str) -> str:
        """READY, LOADING, UNLOADING, UNAVAILABLE, or empty if the server does not know the model."""
        entries = json.loads(self._post("/v2/repository/index", timeout_s=5.0))
        return next((entry.get("state", "") for entry in entries if entry["name"] == model), "")

    def unload(self, model: str) -> None:
        """Order it; requests that are in the model may keep it for longer."""
        self._post(f"/v2/repository/models/{quote(model, safe='')}/unload", timeout_s=30.0)

    def wait_until_gone(self, model: str, timeout_s: float) -> bool:
        """Whether an unloaded model has gone: what is never answered keeps it for ever."""
        give_up_s = time.monotonic() + timeout_s
        while self.state(model) == "UNLOADING":
            if time.monotonic() > give_up_s:
                return False
            time.sleep(0.05)
        return True

    def load(self, model: str, timeout_s: float) -> None:
        """Load it and wait until it is ready."""
        self._post(f"/v2/repository/models/{quote(model, safe='')}/load", timeout_s=timeout_s)

    def _post(self, path: str, *, timeout_s: float) -> bytes:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            connection.request("POST", path, "{}", self._headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise AdminError(f"{path}: {error!r}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise AdminError(f"{path}: {response.status} {body.decode(errors='replace').strip()}")
        return body
