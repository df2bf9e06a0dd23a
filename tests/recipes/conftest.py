"""Models that the recipes' tests share: made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models


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
