"""The small tokenizers of tests/envs serve here, too."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "envs"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
