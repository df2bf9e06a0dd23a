"""What every client of an HTTP server here shares: tokens, proxies, certificates, and what a refusal says."""

from __future__ import annotations

import functools
import socket
import ssl
from urllib.parse import urlsplit

import httpx2


def may_use_proxy(url: str) -> bool:
    """What the environment says of proxies is not for this machine's own addresses, nor are tokens for a proxy."""
    return urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")


def own_place(url: str) -> tuple[str, int]:
    """An IPv4 address of this machine that the host of `url` can reach, and a port that is free there now. Raises
    OSError."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect((parts.hostname or "", parts.port or 80))  # sends nothing
        address = towards.getsockname()[0]
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def token_header(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


@functools.cache
def certificates() -> ssl.SSLContext:
    """The system's. Reading them takes longer than a request."""
    return httpx2.create_ssl_context()


def reason_of(response: httpx2.Response) -> str:
    """What an answer that is no success says: one line of at most 300 characters, with none that steer a terminal."""
    text = response.text
    try:
        value = response.json()
        error = value.get("error", value)
        text = error if isinstance(error, str) else error.get("message") or error.get("detail") or text
    except (ValueError, AttributeError, RecursionError):
        pass
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(printable.split())[:300] or "nothing more"
