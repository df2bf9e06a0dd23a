"""The tokenizers of tests/envs and the students of tests/tool_use serve here, too."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
sys.path[:0] = [str(TESTS / "envs"), str(TESTS / "tool_use")]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
