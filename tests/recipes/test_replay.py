"""Either half of a run alone: training on saved episodes, and rollouts that train nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import episodes, final, training_rows, weights

from models.transformers_sampler import TransformersSampler
from recipes import replay
from recipes.cli import parse_config, run_cli

Models = dict[str, str]
SAME: dict[str, Any] = {"learning_rate": 1e-2, "warmup_steps": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Path:
    path = tmp_path_factory.mktemp("saved") / "run"
    return tiny_models.run(path, models, objective="reverse_kl", eval_size=0, max_steps=3)


def argv(path: Path, models: Models, saved: Path, **options: Any) -> list[str]:
    return [f"{key}={value}" for key, value in {**SAME, **models, "saved": saved, "log_path": path, **options}.items()]


def again(path: Path, models: Models, saved: Path, **options: Any) -> Path:
    with tiny_models.no_report():
        replay.main(parse_config(replay.Config, argv(path, models, saved, **options)))
    return path


def test_a_replay_trains_what_the_run_trained_and_samples_nothing(
    tmp_path: Path, models: Models, saved: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is sampled")

    monkeypatch.setattr(TransformersSampler, "sample", refuse)
    path = again(tmp_path / "run", models, saved)
    ours, theirs = weights(final(path)), weights(final(saved))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    for now, then in zip(training_rows(path), training_rows(saved), strict=True):
        assert now["kl"] == pytest.approx(then["kl"], abs=1e-5) and now["trained_tokens"] == then["trained_tokens"]
        assert now["dataset/arithmetic/kl"] == now["kl"]


def test_another_objective_on_the_same_episodes(tmp_path: Path, models: Models, saved: Path):
    path = again(tmp_path / "run", models, saved, objective="jsd", max_steps=1)
    (row,) = training_rows(path)
    assert row["exact_kl"] > 0 and row["ratio/mean"] == pytest.approx(1, abs=1e-4)  # by those who sampled them
    assert [e["token_ids"] for e in episodes(path, 1)] == [e["token_ids"] for e in episodes(saved, 1)]


def test_one_file_is_one_step(tmp_path: Path, models: Models, saved: Path):
    path = again(tmp_path / "run", models, saved / "episodes" / "step_000002.jsonl")
    assert len(training_rows(path)) == 1
    assert [e["token_ids"] for e in episodes(path, 1)] == [e["token_ids"] for e in episodes(saved, 2)]


def test_rollouts_alone_change_and_save_nothing(tmp_path: Path, models: Models, saved: Path):
    path = tiny_models.run(
        tmp_path / "run", models, objective="reverse_kl", eval_size=0, max_steps=3, rollouts_only=True
    )
    assert list((path / "checkpoints").iterdir()) == []
    assert episodes(path, 1) == episodes(saved, 1)  # the first is made before anything is learnt
    rows, learnt = training_rows(path), training_rows(saved)
    assert [row["step"] for row in rows] == [1, 2, 3] and all("grad_norm" not in row for row in rows)
    assert rows[0]["kl"] == pytest.approx(learnt[0]["kl"], abs=1e-6)
    assert all(row["ratio/mean"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert episodes(path, 3) != episodes(saved, 3)


def test_given_answers_can_be_learnt_from_again(tmp_path: Path, models: Models):
    options: dict[str, Any] = {"objective": "kd", "support": "teacher_topk", "top_k": 4, "alpha": 0.3}
    learnt = tiny_models.run(tmp_path / "run", models, lmbda=0, max_tokens=24, eval_size=0, max_steps=2, **options)
    path = again(tmp_path / "again", models, learnt, **options)
    ours, theirs = weights(final(path)), weights(final(learnt))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    assert [row["loss"] for row in training_rows(path)] == pytest.approx(
        [row["loss"] for row in training_rows(learnt)], abs=1e-5
    )


# --- mistakes


def test_mistakes_are_named(capfd: pytest.CaptureFixture[str], tmp_path: Path, models: Models, saved: Path):
    alien = Path(shutil.copytree(models["model_name"], tmp_path / "alien"))
    content = json.loads((alien / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["+"], vocabulary["="] = vocabulary["="], vocabulary["+"]
    (alien / "tokenizer.json").write_text(json.dumps(content))
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"dataset": "x"}\n')
    (tmp_path / "empty").mkdir()
    for given, options, part in (
        (tmp_path / "nowhere", {}, "no episodes there"),
        (tmp_path / "empty", {}, "no episodes there"),
        (torn, {}, f"{torn}:1: not a saved episode"),
        (saved, {"num_substeps": 2}, "num_substeps=2: a replay makes one update"),
        (saved, {"rollouts_only": True}, "rollouts_only=True: a replay samples nothing"),
        (saved, {"eval_every": 5}, "eval_every=5: a replay has no held-out rows"),
        (saved, {"eval_samples": 0}, "eval_samples=0: a replay has no held-out rows"),
        (saved, {"eval_teacher": True}, "eval_teacher=True: a replay has no held-out rows"),
        (saved, {"max_tokens": 8}, "max_tokens=8: a replay samples nothing"),
        (saved, {"sampler_slots": 8}, "sampler_slots=8: a replay samples nothing"),
        (saved, {"sampler.url": "http://127.0.0.1:9"}, "sampler.url=http://127.0.0.1:9: a replay samples nothing"),
        (saved, {"lmbda": 0}, "lmbda=0: a replay trains on what is saved"),
        (saved, {"objective": "kd"}, "episodes that a student sampled, and objective=kd learns from given answers"),
        (saved, {"model_name": alien, "teacher_model": alien}, "to the student that wrote it"),
        (saved, {"saves": 1}, "Did you mean saved?"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit:
            run_cli(replay.main, replay.Config, argv=argv(tmp_path / "run", models, given, **options))
        err = capfd.readouterr().err
        assert exit.value.code == 2 and err.count("error:") == 1 and part in err, err
        assert sorted(tmp_path.rglob("*")) == before
