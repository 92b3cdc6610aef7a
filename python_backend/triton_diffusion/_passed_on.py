"""What an operator passes on to tritonserver, after `serve ... --`, and what of it `serve` cannot live with.

Whatever is not refused here goes to tritonserver behind our own arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from triton_diffusion.errors import ConfigurationError

_ITS_OWN = "serve sets it itself, so "
# By option of tritonserver: why not, and what to do.
_REFUSED = {
    "--http-address": f"{_ITS_OWN}give --host",
    "--grpc-address": f"{_ITS_OWN}give --host",
    "--metrics-address": f"{_ITS_OWN}give --host",
    "--http-port": f"{_ITS_OWN}give --port",
    "--grpc-port": f"{_ITS_OWN}give --grpc-port before the --",
    "--metrics-port": f"{_ITS_OWN}give --metrics-port before the --",
    "--model-repository": f"{_ITS_OWN}give --model-repository before the --",
    "--model-store": f"{_ITS_OWN}give --model-repository before the --",
    "--exit-timeout-secs": f"{_ITS_OWN}give --exit-timeout-s",
    "--log-file": "serve reads the log to tell how the start goes; give --log-file before the --",
    "--id": "serve knows its server by an id of its own; leave it out",
}
_REFUSED_BACKEND_CONFIGS = {
    "python,shm-region-prefix-name": "serve finds the shared memory to clean up by it; leave it out",
    "python,thread-pool-size": f"{_ITS_OWN}give --max-concurrent-requests, from which it follows",
}
# serve asks for the first two whether the server is ready, and by the third heals its models.
_NEEDED_HTTP_APIS = {"health", "metadata", "model-repository"}
_FALSE = ("false", "0", "off")


def read_options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each option: of `--name=value` and of `--name value`; an option without a value has ""."""
    for argument, following in pairwise([*arguments, ""]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            yield name, value if equals or following.startswith("--") else following


def restricted_apis(arguments: Sequence[str], flag: str) -> set[str]:
    """The APIs that these arguments close by `flag`, of which each occurrence is `APIS:HEADER=VALUE`."""
    values = (value for name, value in read_options(arguments) if name == flag)
    return {api for value in values for api in value.partition(":")[0].split(",")}


def check_passed_on(arguments: Sequence[str], *, has_response_cache: bool = False) -> None:
    """Raise ConfigurationError for an argument with which `serve` could not start, watch or heal the server."""
    for name, value in read_options(arguments):
        if reason := _reason_against(name, value, has_response_cache):
            given = f"{name}={value}" if value else name
            raise ConfigurationError(f"{given} cannot be passed on to tritonserver: {reason}")


def _reason_against(name: str, value: str, has_response_cache: bool) -> str:
    """Empty: it may be passed on."""
    if name == "--model-control-mode" and value != "explicit":
        return "serve loads models anew whose process died, which Triton allows only in mode explicit; leave it out"
    if name == "--allow-http" and value.lower() in _FALSE:
        return "serve asks over HTTP whether the server is ready; let --host or a firewall keep callers from the port"
    if name == "--http-restricted-api" and (needed := sorted(restricted_apis([name, value], name) & _NEEDED_HTTP_APIS)):
        return (
            f"serve itself uses {', '.join(needed)} over HTTP with no other key than that of --admin-key, which closes "
            "model-repository; leave them out"
        )
    if name == "--cache-config" and has_response_cache:
        return f"{_ITS_OWN}give it the size by --response-cache, or leave that out"
    if name == "--backend-config":
        return _REFUSED_BACKEND_CONFIGS.get(value.partition("=")[0], "")
    # Triton also takes an option by its beginning.
    return next((reason for refused, reason in _REFUSED.items() if refused.startswith(name)), "")
