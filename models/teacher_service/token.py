"""The shared secret of service and clients: where it is read from, and how it is compared."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path

from errors import ConfigError

TOKEN_VARIABLE = "PROTEGE_TEACHER_TOKEN"
SHORTEST = 16


def read_token(token_file: str | None) -> str | None:
    """From the file if one is named, else from the environment; None where there is neither. Raises `ConfigError`,
    which says what is wrong with a token but never the token."""
    if token_file is not None:
        where = token_file
        try:
            token = Path(token_file).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{token_file}: the token cannot be read ({type(error).__name__})") from error
    else:
        where = f"${TOKEN_VARIABLE}"
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            return None
    if not re.fullmatch(rf"[!-~]{{{SHORTEST},}}", token):
        raise ConfigError(
            f"{where}: a token is one word of {SHORTEST} or more printable ASCII characters, found were {len(token)}. "
            "Make one with: openssl rand -hex 32"
        )
    return token


def is_token(given: bytes, expected: str) -> bool:
    """In a time that says nothing of how much of it was right."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(expected.encode()).digest())
