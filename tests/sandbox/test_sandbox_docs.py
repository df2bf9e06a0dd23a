"""The code of docs/sandboxes.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "sandboxes.md"


@pytest.mark.anyio
@pytest.mark.docker
async def test_the_example_runs(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, PAGE.name, "exec"), namespace)
    await namespace["main"]()
    assert (tmp_path / "app/greet.sh").read_text() == "echo hello $1\n"
