"""A whole training run on a real engine while sandboxes are struck, the engine restarts and the run is killed.

Every attempt is trained or counted under a reason, no tool result is made up, no graded attempt loses its
reward for our fault, and nothing stays behind.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "sandbox"))
import faults
from own_engine import OwnEngine

from recipes.tiny_tool_models import make_models
from sandbox.base_image import ensure_base_image

pytestmark = pytest.mark.docker

OPTIONS = {
    "group_size": 8, "max_turns": 4, "max_tokens": 700, "max_trajectory_tokens": 6000, "lora_rank": 0,
    "learning_rate": 1e-3, "system_prompt": "", "command_timeout_s": 20, "max_output_bytes": 1000, "device": "cpu",
    "eval_size": 2, "eval_samples": 4, "max_sandboxes": 32, "max_dropped_fraction": 0.95, "seed": 1,
}  # fmt: skip


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnEngine]:
    with OwnEngine() as engine:
        monkeypatch.setenv("DOCKER_HOST", engine.host)
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        engine.start()
        ensure_base_image()
        yield engine


@pytest.mark.parametrize(
    ("groups", "steps", "restart_at", "kill_at"),
    [
        pytest.param(2, 3, 1, 2, id="dozens"),
        pytest.param(4, 12, 4, 9, id="hundreds", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_everything_happens_to_keeps_true_books(
    groups: int, steps: int, restart_at: int, kill_at: int, engine: OwnEngine, tmp_path: Path
):
    student, teacher = make_models(tmp_path / "models", context=6000)
    models = {"model_name": student, "teacher_model": teacher}
    path = tmp_path / f"faults-{secrets.token_hex(4)}"  # its sandboxes are told by this name
    options: dict[str, Any] = {
        **OPTIONS, **models, "log_path": path, "groups_per_batch": groups, "max_steps": steps,
        "eval_every": max(2, steps // 4), "save_every": 1 if steps < 5 else 2,
    }  # fmt: skip
    outcome = faults.run_with_faults(
        [f"{key}={value}" for key, value in options.items()],
        path,
        tmp_path,
        every_s=(2.0, 6.0),
        restart=(restart_at, engine.restart),
        kill_at=kill_at,
        within_s=2400,
    )
    faults.check_nothing_is_left(path)
    counted = faults.check_books(outcome, models, steps=steps, per_step=groups * OPTIONS["group_size"])
    print(dict(counted), outcome.exits, [f"{until - began:.1f} s" for began, until in outcome.restarts])
    assert outcome.exits[-1] == 0 and -9 in outcome.exits and len(outcome.restarts) == 1
    assert counted["trained"] > counted["attempts"] / 3
