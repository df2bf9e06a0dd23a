"""Where the service listens, and for how long: the socket, uvicorn, and its end."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from errors import ConfigError
from models.teacher_service.server import Service
from models.teacher_service.token import TOKEN_VARIABLE

GRACE_S = 20
"""On SIGTERM or SIGINT, the batch that is being scored has so long to be answered."""
_CONNECTIONS = 256


def listen(host: str, port: int, *, token: str | None) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ConfigError` off loopback without a token, and for an
    address that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"host={host}: no such address here ({error.strerror or error})") from error
    if token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ConfigError(
            f"host={host} can be reached by other machines: give a token, by token_file= or ${TOKEN_VARIABLE}, "
            "or use host=127.0.0.1"
        )
    try:
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"host={host} port={port}: cannot listen there ({error}); give another port") from error


def make_server(service: Service) -> Any:
    """A `uvicorn.Server` whose `serve(sockets=[...])` ends at a signal or at `should_exit`. Raises `ConfigError`."""
    try:
        import uvicorn  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("serving teachers needs FastAPI and uvicorn: pip install 'protege[serve]'") from error

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.queue.close()  # clients that wait are sent away to try again; only what is being scored is finished
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(
            service.app,  # type: ignore[arg-type]
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
