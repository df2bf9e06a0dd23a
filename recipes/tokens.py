"""A server's token: where the options say that it is, and never in an option itself, as those are saved and shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from errors import ConfigError


def read_token(token_env: str | None, token_file: str | None, *, prefix: str = "") -> str | None:
    """The token, read now; None where neither is given. `prefix`: of the options, in messages. Raises `ConfigError`."""
    if token_env is not None:
        token = os.environ.get(token_env, "").strip()
        if not re.fullmatch(r"[!-~]+", token):
            raise ConfigError(f"{prefix}token_env={token_env}: this variable is not set, or holds no ASCII token")
        return token
    if token_file is None:
        return None
    try:
        token = Path(token_file).expanduser().read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{prefix}token_file={token_file}: cannot be read ({type(error).__name__})") from error
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{prefix}token_file={token_file}: expected one line, the token, in ASCII without spaces")
    return token


def check_one_place(token_env: str | None, token_file: str | None, *, prefix: str = "") -> None:
    """Raises `ConfigError`."""
    if token_env is not None and token_file is not None:
        raise ConfigError(f"{prefix}token_env and {prefix}token_file both say where the token is: give one of them")
