"""Free ports, and the addresses that clients use."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence

from triton_diffusion.errors import ConfigurationError


def choose_ports(host: str, *given: int | None) -> tuple[int, int, int]:
    """The ports for HTTP, gRPC and metrics: the given ones, and free ones in place of None.

    Raises ConfigurationError if a given port is taken or given twice.
    """
    chosen: list[int] = []
    for port, flag in zip(given, ("--port", "--grpc-port", "--metrics-port"), strict=True):
        if port is None:
            port = _free_port(host, besides=[*chosen, *(other for other in given if other)])
        elif port in chosen:
            raise ConfigurationError(f"port {port} is given twice; HTTP, gRPC and metrics need one each")
        elif not _is_free(host, port):
            raise ConfigurationError(
                f"{flag}={port} is in use on {host}; stop what listens there, or choose another port"
            )
        chosen.append(port)
    http_port, grpc_port, metrics_port = chosen
    return http_port, grpc_port, metrics_port


def reachable_host(host: str) -> str:
    """Where a client on this machine reaches what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def join_address(host: str, port: int) -> str:
    """`host:port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _free_port(host: str, besides: Sequence[int]) -> int:
    # Below the range from which the kernel takes ports for outgoing connections, which come and go at any
    # time.
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
        if port not in besides and _is_free(host, port):
            return port
    raise ConfigurationError(
        f"no free port found on {host} between 20000 and 32000; give --port, --grpc-port, --metrics-port"
    )


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"{host}:{port} is not an address to listen on: {error}") from error
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True
