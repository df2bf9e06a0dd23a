"""Runs whose teacher is on `recipes.serve_teacher`: the same students as with the teacher in the process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import REVERSE_KL, run, training_rows, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # the service that its own tests use

from teacher_services import TOKEN, Running, running

from errors import ConfigError, NoSignalError, TokenizerMismatchError
from models.teacher_service.client import RemoteScorer
from models.teacher_service.hosting import ServedModel
from recipes import own_service, serve_teacher
from recipes.cli import parse_config
from recipes.embedded import char_tokenizer
from training import loop

JSD = {"objective": "jsd"}


def models_of(*folders: str) -> list[ServedModel]:
    argv = [f"models.{i}.model_name={folder}" for i, folder in enumerate(folders)]
    return serve_teacher.served_models(parse_config(serve_teacher.Config, [*argv, "device=cpu"]))


@pytest.fixture(scope="module")
def service(teacher: str, student: str) -> Iterator[Running]:
    with running(*models_of(teacher, student)) as service:
        yield service


@pytest.fixture
def served(service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options that name the service in place of a folder of weights."""
    monkeypatch.setenv("PROTEGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    return {"teacher.url": service.url, "teacher.served_model": "teacher", "teacher.token_env": "MY_TOKEN"}


@pytest.mark.parametrize(
    "objective",
    [
        REVERSE_KL,
        {**JSD, "beta": 0.5},
        pytest.param({**JSD, "support": "student_topk", "top_k": 5}, marks=pytest.mark.slow),
        {**JSD, "support": "teacher_topk", "top_k": 5, "temperature": 0.7},
        pytest.param({"objective": "topk_forward_kl", "top_k": 5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_student_learns_the_same_from_a_served_teacher(
    tmp_path: Path, models: dict[str, str], served: dict[str, Any], objective: dict[str, Any]
):
    near = run(tmp_path / "near", models, **objective)
    far = run(tmp_path / "far", models, **served, **objective)
    for a, b in zip(training_rows(near), training_rows(far), strict=True):
        assert b["kl"] == pytest.approx(a["kl"], rel=0.02, abs=2e-3)  # hidden states in bfloat16
        assert b["trained_tokens"] == a["trained_tokens"]
    start = weights(Path(models["model_name"]))
    ours, theirs = (weights(tiny_models.final(path)) for path in (near, far))
    moved = torch.cat([(ours[name] - start[name]).flatten() for name in start]).norm()
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in start]).norm()
    assert apart <= 0.05 * moved


@pytest.mark.parametrize(
    ("dtype", "gap", "passes"), [("float32", 0.02, False), ("bfloat16", 0.02, True), ("bfloat16", 0.06, False)]
)
def test_a_service_in_bfloat16_may_round_otherwise_from_batch_to_batch(
    service: Running,
    served: dict[str, Any],
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    gap: float,
    passes: bool,
):
    """A busy service scores a sequence with whatever comes beside it."""
    find, score, calls = own_service.find, RemoteScorer.score, []

    async def found(*arguments: Any) -> Any:
        it = await find(*arguments)
        return it and replace(it, model=it.model.model_copy(update={"dtype": dtype}))

    async def other_each_time(self: RemoteScorer, views: Any, need: Any) -> Any:
        calls.append(views)
        return [
            replace(signal, logprobs=signal.logprobs - gap * len(calls)) for signal in await score(self, views, need)
        ]

    monkeypatch.setattr(own_service, "find", found)
    monkeypatch.setattr(RemoteScorer, "score", other_each_time)
    with nullcontext() if passes else pytest.raises(ConfigError, match=f"differs by {gap:.3g} nats"):
        run(tmp_path / "run", models, **JSD, **served, dry_run=True)
    assert len(calls) == 2


def test_a_service_that_stays_away_ends_the_run_which_goes_on_when_it_is_back(
    tmp_path: Path, models: dict[str, str], served: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
):
    options = {**served, **JSD, "max_steps": 4, "save_every": 1, "teacher.patience_s": 0.3}
    train_step, steps = loop.Loop.train_step, []

    async def stopping(self: loop.Loop) -> None:
        await train_step(self)
        steps.append(self.step)
        if len(steps) == 2:
            first.stop()

    with running(*models_of(teacher)) as first, monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "train_step", stopping)
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(NoSignalError, match="cannot be reached"):
            run(tmp_path / "run", models, **{**options, "teacher.url": first.url})
    assert len(training_rows(tmp_path / "run")) == 2, "nothing was trained without a signal"
    with running(*models_of(teacher), port=port) as second:
        assert second.url == first.url
        run(tmp_path / "run", models, **{**options, "teacher.url": second.url})
        whole = run(tmp_path / "whole", models, **{**options, "teacher.url": second.url})
    rows, expected = (training_rows(path) for path in (tmp_path / "run", whole))
    assert [row["kl"] for row in rows] == pytest.approx([row["kl"] for row in expected], rel=1e-3)


def test_what_cannot_be_is_refused_before_anything_is_trained(
    tmp_path: Path, models: dict[str, str], served: dict[str, Any], service: Running
):
    for changes, says in (
        ({"teacher.served_model": "other"}, "serves teacher, student, not other.*teacher.served_model="),
        ({"teacher.token_env": None}, "refuses: the token is missing.*teacher.token_env="),
        ({"teacher.url": f"{service.url},{service.url}/x"}, "give one address"),
    ):
        given = {k: v for k, v in {**served, **REVERSE_KL, **changes}.items() if v is not None}
        with pytest.raises(ConfigError, match=says):
            run(tmp_path / "r", models, **given)
        assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="give teacher_model="):
        run(tmp_path / "r", {"model_name": models["model_name"]}, **served, **REVERSE_KL)


def test_another_tokenizer_than_the_services_is_named(
    tmp_path: Path, models: dict[str, str], served: dict[str, Any], made: Path
):
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["new"])
    other = tiny_models.make_model(made / "other-tokenizer", seed=3, tokenizer=tokenizer)
    with pytest.raises(TokenizerMismatchError, match=r"other-tokenizer.* is not the one that teacher at"):
        run(tmp_path / "r", {**models, "teacher_model": other}, **served, **REVERSE_KL)
