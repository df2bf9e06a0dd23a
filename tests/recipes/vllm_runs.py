"""What the tests of runs on a real vLLM have in common: models that it takes, and how a run on it is compared."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_models import evaluation_rows, training_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import vllm_server

from recipes import evaluate
from recipes.cli import parse_config

OPTIONS: dict[str, Any] = {
    "objective": "jsd", "max_steps": 8, "max_tokens": 6, "eval_size": 16, "groups_per_batch": 16, "learning_rate": 3e-2,
}  # fmt: skip
SLACK = 1e-4  # nats of KL that rounding may make between sampler and learner


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With heads that vLLM's attention on CPUs takes."""
    folder = tmp_path_factory.mktemp("vllm")
    return {
        "model_name": tiny_models.make_model(folder / "student", seed=1, hidden=64),
        "teacher_model": tiny_models.make_model(folder / "teacher", seed=2, hidden=64),
    }


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in vllm_server.SMALL_CPU.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def in_this_process(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with: sampled by transformers."""
    return tiny_models.run(tmp_path_factory.mktemp("transformers") / "run", models, **OPTIONS)


def check_it_learnt_like(run: Path, reference: Path) -> None:
    """The same fall of the KL but for the draws, and at every step a sampler that is the learner."""
    rows = training_rows(run)
    assert [row["step"] for row in rows] == list(range(1, OPTIONS["max_steps"] + 1))
    assert all(row["mismatch_kl"] < SLACK and row["sampler_gap/max"] < 0.01 for row in rows)
    before, after = (row["eval/exact_reverse_kl"] for row in evaluation_rows(run))
    _, expected = (row["eval/exact_reverse_kl"] for row in evaluation_rows(reference))
    assert after < 0.85 * before
    assert after == pytest.approx(expected, rel=0.2)
    assert not tiny_models.leftovers(run)


def until(condition: Callable[[], bool], timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not get there"
        time.sleep(0.05)


def steps_done(run: Path) -> int:
    return len(training_rows(run)) if (run / "metrics.jsonl").exists() else 0


EVALUATION = {"dataset": "arithmetic", "eval_size": 16, "samples": 0, "max_tokens": 6, "device": "cpu"}
GREEDY = ("eval/accuracy", "eval/greedy_length", "eval/greedy_truncated_fraction")


def evaluated(folder: Path, **options: Any) -> list[float]:
    given = {**EVALUATION, **options, "output_path": folder / "numbers.json"}
    recipe = evaluate
    recipe.main(parse_config(recipe.Config, [f"{key}={value}" for key, value in given.items()]))
    found = json.loads((folder / "numbers.json").read_text())
    return [found[name] for name in GREEDY]
