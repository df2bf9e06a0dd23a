"""Where the service listens: the socket, and what serves on it."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

from errors import ConfigError
from models.teacher_service.server import Service
from models.teacher_service.token import TOKEN_VARIABLE

if TYPE_CHECKING:
    from models.teacher_service.bounded_server import BoundedServer


def listen(host: str, port: int, *, token: str | None) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ConfigError` off loopback without a token, and for an
    address that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: for a label that no name server could know
        reason = error.strerror if isinstance(error, OSError) else error.__cause__
        raise ConfigError(f"host={host}: no such address here ({reason or error})") from error
    if token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ConfigError(
            f"host={host} can be reached by other machines: give a token, by token_file= or ${TOKEN_VARIABLE}, "
            "or use host=127.0.0.1"
        )
    try:
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"host={host} port={port}: cannot listen there ({error}); give another port") from error


def make_server(service: Service) -> BoundedServer:
    """A `uvicorn.Server` whose `serve(sockets=[...])` ends at `should_exit`. Raises `ConfigError`."""
    try:
        from models.teacher_service.bounded_server import BoundedServer
    except ImportError as error:
        raise ConfigError("serving teachers needs FastAPI and uvicorn: pip install 'protege[serve]'") from error
    return BoundedServer(service)
