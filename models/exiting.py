"""The end of a process that waits for nothing any longer."""

from __future__ import annotations

import os
import select
from typing import NoReturn


def exit_now(code: int, *said: tuple[int, bytes]) -> NoReturn:
    """With last words to file descriptors, but to none that would make it wait: a full pipe that nobody reads. In a
    signal's handler, too."""
    try:
        for stream, text in said:
            if select.select([], [stream], [], 0)[1]:
                os.write(stream, text)
    finally:
        os._exit(code)
