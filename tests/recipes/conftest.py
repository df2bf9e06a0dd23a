"""Models that the recipes' tests share: made once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import tiny_models

from envs import arithmetic


@pytest.fixture(scope="session", autouse=True)
def problems_made_once() -> Iterator[None]:
    """Ten thousand rows take longer than most of these tests."""
    with mock.patch.object(arithmetic, "rows", cache(arithmetic.rows)):
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def student(made: Path) -> str:
    return tiny_models.make_model(made / "student", seed=1)


@pytest.fixture(scope="session")
def teacher(made: Path) -> str:
    return tiny_models.make_model(made / "teacher", seed=2, hidden=24, extra_vocabulary=3)  # a padded embedding


@pytest.fixture(scope="session")
def models(student: str, teacher: str) -> dict[str, str]:
    return {"model_name": student, "teacher_model": teacher}
