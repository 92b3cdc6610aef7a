"""Where the server is, and how to talk to it: read once from a client's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from triton_diffusion_client._protocol import TransportName
from triton_diffusion_client.errors import ServerUnavailableError

ADMIN_KEY_HEADER = "triton-diffusion-admin-key"
CONNECTION_TIMEOUT_S = 10.0
"""How long a server may take to accept a connection, before there is a request."""
DEFAULT_URLS: dict[TransportName, str] = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A server's address and what to show it with every request."""

    protocol: TransportName
    address: str
    """host:port, for HTTP with a path if a proxy needs one."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every request: HTTP headers or gRPC metadata."""
    ssl: bool = False
    root_certificates: Path | None = None
    """PEM file of the authorities to trust; None: the system's."""
    private_key: Path | None = None
    certificate_chain: Path | None = None
    """PEM files by which the client proves who it is; both or none."""

    def with_admin_key(self, key: str) -> Connection:
        """The same with what opens the APIs that the server keeps for its operator."""
        # Triton takes no other key over gRPC than one with this prefix.
        prefix = "triton-grpc-protocol-" if self.protocol == "grpc" else ""
        return replace(self, headers={**self.headers, f"{prefix}{ADMIN_KEY_HEADER}": key})

    def unreachable(
        self, reason: Exception | str, request_id: str | None = None, *, was_connected: bool = True
    ) -> ServerUnavailableError:
        """The error for a server that does not answer, or (`was_connected`) stopped answering."""
        port = "gRPC" if self.protocol == "grpc" else "HTTP"
        reason = str(reason) or type(reason).__name__
        return ServerUnavailableError(
            f"cannot reach a server at {self.address} ({reason}); start one with 'triton-diffusion serve', or give the "
            f"url of the {port} port of one that runs",
            request_id=request_id,
            was_connected=was_connected,
        )


def open_connection(
    *,
    url: str | None,
    protocol: TransportName,
    headers: Mapping[str, str] | None,
    ssl: bool,
    root_certificates: str | Path | None = None,
    private_key: str | Path | None = None,
    certificate_chain: str | Path | None = None,
) -> Connection:
    """Check the arguments of a client. Raises ValueError."""
    if protocol not in DEFAULT_URLS:
        raise ValueError(f"protocol={protocol!r} is unknown; use 'grpc' or 'http'")
    address = url or DEFAULT_URLS[protocol]
    if "://" in address:
        scheme, _, rest = address.partition("://")
        allowed = {"grpc": ("grpc", "grpcs"), "http": ("http", "https")}[protocol]
        if scheme not in allowed:
            other = "http" if protocol == "grpc" else "grpc"
            raise ValueError(
                f"url={address!r} does not fit protocol={protocol!r}; give host:port, or protocol={other!r}"
            )
        address, ssl = rest, ssl or scheme in ("grpcs", "https")
    address = address.rstrip("/")
    if protocol == "http":
        _check_http_address(address)
    if (private_key is None) != (certificate_chain is None):
        raise ValueError("private_key and certificate_chain belong together; give both or none")
    return Connection(
        protocol=protocol,
        address=address,
        headers=dict(headers or {}),
        ssl=ssl,
        root_certificates=_to_path(root_certificates),
        private_key=_to_path(private_key),
        certificate_chain=_to_path(certificate_chain),
    )


def _check_http_address(address: str) -> None:
    try:
        valid = bool(urlsplit(f"//{address}").hostname) and urlsplit(f"//{address}").port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"url={address!r} is not an address; give host:port, for example {DEFAULT_URLS['http']}")


def _to_path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
