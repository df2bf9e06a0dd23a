"""Teachers that take turns in memory: the numbers of teachers that stay, and never more of them than allowed."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models
from test_on_policy_multi_teacher import argv, arithmetic, asking, run, write
from test_shared_teachers import make_adapter
from tiny_models import evaluation_rows, fingerprint, training_rows

from models.causal_lm import CausalLM
from recipes import engines, memory
from recipes import on_policy_multi_teacher as recipe
from recipes.cli import parse_config, run_cli
from training import collect


@pytest.fixture(scope="module")
def second(made: Path) -> str:
    return tiny_models.make_model(made / "second", seed=3)


@pytest.fixture(scope="module")
def third(made: Path) -> str:
    return tiny_models.make_model(made / "third", seed=4)


@contextmanager
def watched() -> Iterator[list[tuple[str, int]]]:
    """Of each load of a teacher its name, and how many of the others were in memory."""
    loads: list[tuple[str, int]] = []
    models: list[weakref.ref[Any]] = []
    load = engines.load_teacher

    def noting(config: Any, checked: Any, source: Any) -> CausalLM:
        alive = sum(model() is not None for model in models)
        lm = load(config, checked, source)
        loads.append((source.name, alive))
        models.append(weakref.ref(lm.model))
        return lm

    with mock.patch.object(engines, "load_teacher", noting):
        yield loads


@pytest.mark.parametrize("objective", ["reverse_kl", "jsd", "topk_forward_kl"])
def test_one_at_a_time_trains_what_all_of_them_train(
    objective: str, tmp_path: Path, student: str, teacher: str, second: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(collect, "SCORE_TOKENS", 24)  # several batches a step
    data = arithmetic("one", teacher), arithmetic("two", second)
    kept = run(tmp_path / "kept", student, *data, objective=objective)
    with watched() as loads:
        turns = run(tmp_path / "turns", student, *data, objective=objective, teachers_in_memory=1)
    assert fingerprint(turns) == fingerprint(kept)
    assert [alive for _, alive in loads] == [0] * len(loads), "another was still in memory"
    assert {name for name, _ in loads} == {teacher, second}
    assert 2 * 2 < len(loads) <= 2 * 5, "each is loaded again, once a step at most"  # probes, 2 steps, 2 evaluations
    assert [row.keys() for row in evaluation_rows(turns)] == [row.keys() for row in evaluation_rows(kept)]


def test_those_asked_last_stay(tmp_path: Path, student: str, teacher: str, second: str, third: str):
    data = [arithmetic(name, who, eval_size=0) for name, who in (("a", teacher), ("b", second), ("c", third))]
    with watched() as loads:
        run(tmp_path / "two", student, *data, teachers_in_memory=2)
    assert max(alive for _, alive in loads) == 1
    with watched() as loads:
        run(tmp_path / "three", student, *data, teachers_in_memory=3)
    assert [name for name, _ in loads] == [teacher, second, third], "all have room: each is loaded once"


def test_a_blend_of_teachers_that_take_turns(tmp_path: Path, student: str, teacher: str, second: str):
    rows = [asking(f"{n}+{n}=") for n in range(20, 30)]
    options: dict[str, Any] = {
        "teachers__0__model": teacher, "teachers__0__blend_weight": 0.7, "objective": "jsd",
        "teachers__1__model": second, "teachers__1__blend_weight": 0.3, "max_steps": 1,
    }  # fmt: skip
    data = {"dataset": write(tmp_path / "rows.jsonl", *rows), "groups_per_batch": 4}
    kept = run(tmp_path / "kept", student, data, **options)
    turns = run(tmp_path / "turns", student, data, **options, teachers_in_memory=1)
    assert fingerprint(turns) == fingerprint(kept)


def test_adapters_take_turns_with_their_base(tmp_path: Path, made: Path, student: str, teacher: str, second: str):
    """Full training: the adapters' base is loaded for them."""
    adapters = [make_adapter(made / f"turns{i}", teacher, seed=i) for i in (5, 6)]
    data = [arithmetic(f"a{i}", teacher, teacher_checkpoint=a, eval_size=0) for i, a in enumerate(adapters)]
    data.append(arithmetic("b", second, eval_size=0))
    kept = run(tmp_path / "kept", student, *data)
    with watched() as loads:
        turns = run(tmp_path / "turns", student, *data, teachers_in_memory=1)
    assert fingerprint(turns) == fingerprint(kept) and all(alive == 0 for _, alive in loads)


def test_the_teacher_itself_can_be_evaluated(tmp_path: Path, student: str, teacher: str, second: str):
    data = arithmetic("one", teacher), arithmetic("two", second)
    with watched() as loads:
        path = run(tmp_path / "run", student, *data, eval_teacher=True, teachers_in_memory=1, max_steps=1)
    found = {key for row in evaluation_rows(path) for key in row}
    assert {f"eval/one/{teacher}/teacher_accuracy", f"eval/two/{second}/teacher_accuracy"} <= found
    assert all(alive == 0 for _, alive in loads)


def test_a_teacher_whose_files_change_is_another_teacher(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, student: str, teacher: str, second: str
):
    mine = shutil.copytree(teacher, tmp_path / "mine")
    data = arithmetic("one", str(mine), eval_size=0), arithmetic("two", second, eval_size=0)
    load = engines.load_teacher

    def changing(config: Any, checked: Any, source: Any) -> CausalLM:
        lm = load(config, checked, source)
        if source.name == second:
            shutil.copy(Path(second, "model.safetensors"), mine / "model.safetensors")
        return lm

    given = argv(tmp_path / "run", student, *data, teachers_in_memory=1, max_dropped_fraction=1.0)
    with mock.patch.object(engines, "load_teacher", changing), pytest.raises(SystemExit):
        run_cli(recipe.main, recipe.Config, argv=given)
    err = capfd.readouterr().err
    assert f"teacher {mine} could not be loaded again: its files have changed since the run began" in err
    assert training_rows(tmp_path / "run") == []


def test_a_dry_run_counts_the_largest_that_are_together(
    tmp_path: Path, student: str, teacher: str, second: str, capsys: pytest.CaptureFixture[str]
):
    def total(**options: Any) -> tuple[str, float]:
        data = arithmetic("one", teacher), arithmetic("two", second)
        config = parse_config(recipe.Config, argv(tmp_path / "run", student, *data, dry_run=True, **options))
        with mock.patch.object(memory, "_gib", str):  # the bytes
            recipe.main(config)
        out = capsys.readouterr().out
        return out, float(out.split("in all: ")[1].split(",")[0])

    (_, all_of_them), (text, one) = total(), total(teachers_in_memory=1)
    assert one < all_of_them and "of these 2 models of teachers, 1 in memory at a time" in text


def test_none_at_a_time_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, student: str, teacher: str):
    with pytest.raises(SystemExit) as exit:
        run_cli(
            recipe.main, recipe.Config,
            argv=argv(tmp_path / "run", student, arithmetic("one", teacher), teachers_in_memory=0),
        )  # fmt: skip
    assert exit.value.code == 2 and "teachers_in_memory=0: expected 1 or more" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
