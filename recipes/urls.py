"""A server's address, as options give it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import httpx2

from errors import ConfigError


def check_url(url: str, *, prefix: str = "", with_path: bool = False) -> None:
    """`prefix`: of the option `url`, in messages. Raises `ConfigError`."""
    if not url:
        raise ConfigError(f"{prefix}url is empty: give an address like http://host:8000, or leave it out")
    if "@" in url:  # what is in an option is saved in config.json
        raise ConfigError(
            f"{prefix}url holds a user or a password: leave it out, and give the token with {prefix}token_env or "
            f"{prefix}token_file"
        )
    if not _is_usable(url, with_path):
        raise ConfigError(f"{prefix}url={url}: expected an address like http://host:8000")


def _is_usable(url: str, with_path: bool) -> bool:
    try:
        parts, host = urlsplit(url), httpx2.URL(url).raw_host
        port = parts.port
    except (ValueError, httpx2.InvalidURL):
        return False
    if parts.scheme not in ("http", "https") or port == 0 or re.search(r"[?#\s]", url):
        return False
    # longer labels, and empty ones, end in a UnicodeError when the name is looked up
    labels = host.removesuffix(b".").split(b".")
    return all(0 < len(label) < 64 for label in labels) and (with_path or not parts.path.strip("/"))
