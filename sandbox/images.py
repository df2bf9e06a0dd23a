"""Images by name: from the engine, or pulled from a registry once."""

from __future__ import annotations

from errors import ImageBuildError
from sandbox.docker_engine import Engine


class Images:
    """The images of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def pull(self, image: str) -> None:
        raise ImageBuildError(f"the engine has no image {image}")
