"""Several teachers in one run: each judges its own rows, one checkpoint is one teacher, and mistakes are named."""

from __future__ import annotations

import json
import re
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import chz
import pytest
import tiny_models
import torch
from tiny_models import episodes, evaluation_rows, final, fingerprint, training_rows, weights
from transformers import AutoModelForCausalLM

from errors import ConfigError
from recipes import capture_teacher, evaluate
from recipes import on_policy_multi_teacher as recipe
from recipes.cli import help_text, parse_config, run_cli
from recipes.config import TrainConfig
from recipes.mixture import DatasetOptions
from recipes.served import ServerOptions
from recipes.teacher_options import OneTeacher

BASE: dict[str, Any] = {
    "max_tokens": 6, "max_steps": 2, "learning_rate": 1e-2, "eval_every": 0, "save_every": 0, "device": "cpu",
    "sampler_slots": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def second(made: Path) -> str:
    return tiny_models.make_model(made / "second", seed=3)


def arithmetic(name: str, teacher: str, rows: int = 12, groups: int = 3, **options: Any) -> dict[str, Any]:
    given = {"dataset": "arithmetic", "name": name, "teacher_model": teacher, "max_rows": rows}
    return {**given, "groups_per_batch": groups, "eval_size": 3, **options}


def argv(path: Path, student: str, *datasets: dict[str, Any], **options: Any) -> list[str]:
    """`a__b` in `options` is `a.b`."""
    given = {**BASE, "model_name": student, "log_path": path}
    given |= {f"datasets.{i}.{key}": value for i, data in enumerate(datasets) for key, value in data.items()}
    given |= {key.replace("__", "."): value for key, value in options.items()}
    return [f"{key}={value}" for key, value in given.items()]


def run(path: Path, student: str, *datasets: dict[str, Any], **options: Any) -> Path:
    with tiny_models.no_report():
        recipe.main(parse_config(recipe.Config, argv(path, student, *datasets, **options), presets=recipe.presets))
    return path


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asking(text: str, **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **keys}


@cache
def plain(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def judged_by(episode: dict[str, Any], folder: str) -> bool:
    """Whether the recorded logprobs of the teacher are those of this model's plain forward."""
    ids = episode["token_ids"]
    with torch.no_grad():
        logprobs = plain(folder)(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprobs[i - 1, token]) for i, token in enumerate(ids) if episode["sampled"][i]]
    return [x for x in episode["teacher_logprobs"] if x is not None] == pytest.approx(expected, abs=1e-4)


def test_every_dataset_is_judged_by_its_own_teacher_and_measured_apart(
    tmp_path: Path, student: str, teacher: str, second: str, capsys: pytest.CaptureFixture[str]
):
    data = arithmetic("one", teacher, group_size=2), arithmetic("two", second, rows=4, groups=2)
    path = run(tmp_path / "run", student, *data, eval_teacher=True)
    first = episodes(path, 1)
    assert [row["dataset"] for row in first] == ["one"] * 6 + ["two"] * 2
    for row in first:
        own, other = (teacher, second) if row["dataset"] == "one" else (second, teacher)
        assert row["teacher"] == own and judged_by(row, own) and not judged_by(row, other)
    for row in training_rows(path):
        scopes = [f"dataset/one/{{}} teacher/{teacher}/{{}}", f"dataset/two/{{}} teacher/{second}/{{}}"]
        for scope in scopes:
            by_dataset, by_teacher = scope.format("kl", "kl").split()
            assert row[by_dataset] == row[by_teacher]
        assert row["dataset/one/trained_episodes"] == 6 and row["dataset/two/trained_episodes"] == 2
        low, high = sorted((row["dataset/one/kl"], row["dataset/two/kl"]))
        assert low < row["kl"] < high
    *taught, before, after = evaluation_rows(path)
    assert capsys.readouterr().out.count("accuracy, greedy: 0.0000 -> 0.0000 ± 0.0000   (teacher: 0.000)\n") == 2
    assert {f"eval/one/{teacher}/teacher_accuracy", f"eval/two/{second}/teacher_accuracy"} <= {*taught[0], *taught[1]}
    for row in (before, after):
        assert {"eval/one/exact_reverse_kl", "eval/two/exact_reverse_kl"} <= row.keys()


def test_a_dataset_s_weight_is_on_its_tokens_losses(tmp_path: Path, student: str, teacher: str, second: str):
    """At learning rate 0 the gradient's norm is all that changes; weights that are alike only scale it."""

    def norm(*factors: float) -> float:
        given = zip((teacher, second), factors, strict=True)
        data = [arithmetic(f"d{i}", who, eval_size=0, weight=w) for i, (who, w) in enumerate(given)]
        path = run(tmp_path / str(factors), student, *data, learning_rate=1e-30, max_steps=1, num_substeps=1)
        return training_rows(path)[0]["grad_norm"]

    plain, double, first, both = norm(1, 1), norm(2, 2), norm(1, 1e-9), norm(1e-9, 1)
    assert double == pytest.approx(2 * plain, rel=1e-5)
    assert max(first, both) < first + both and plain < first + both  # two gradients of unlike directions
    assert abs(first - both) < plain


def test_datasets_are_drawn_from_one_by_one_until_the_largest_ends(tmp_path: Path, student: str, teacher: str):
    data = [
        arithmetic("large", teacher, rows=10, groups=3, eval_size=0),
        arithmetic("small", teacher, rows=4, groups=3, eval_size=0),
    ]
    path = run(tmp_path / "run", student, *data, max_steps="None")
    rows = training_rows(path)
    assert len(rows) == 4  # 10 rows by threes
    assert [row["dataset/large/epoch"] for row in rows] == [0, 0, 0, 1]
    assert [row["dataset/small/epoch"] for row in rows] == [0, 1, 2, 2]
    drawn = [row["row_id"] for step in range(1, 5) for row in episodes(path, step) if row["dataset"] == "small"]
    epochs = [drawn[i : i + 4] for i in range(0, 12, 4)]
    assert all(len(set(epoch)) == 4 for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1


def test_two_routes_to_one_checkpoint_are_one_teacher_to_the_bit(tmp_path: Path, student: str, teacher: str):
    copy = shutil.copytree(teacher, tmp_path / "copy")
    first, second = arithmetic("one", teacher, eval_size=0), arithmetic("two", "", eval_size=0)
    with tiny_models.captured_engines() as engines:
        routes: list[dict[str, Any]] = [
            {"teacher_model": teacher},
            {"teacher_model": copy},
            {"teacher_model": teacher, "teacher_checkpoint": copy},
        ]
        runs = [run(tmp_path / f"run{i}", student, first, {**second, **route}) for i, route in enumerate(routes)]
    for parts in engines:
        assert len({id(lm) for lm in parts.teacher_lms.values()}) == 1
        assert len({id(t.scorer) for t in parts.teachers.values()}) == 1
    assert [len(parts.teachers) for parts in engines] == [1, 2, 2]
    one, *others = (fingerprint(path) for path in runs)
    for other in others:
        assert other["weights"] == one["weights"] and other["optimizer"] == one["optimizer"]


def test_a_lora_student_shares_its_base_with_a_teacher_beside_another(tmp_path: Path, student: str, teacher: str):
    data = [
        arithmetic("self", student, teacher_system_prompt="add", eval_size=0),
        arithmetic("other", teacher, eval_size=0),
    ]
    with tiny_models.captured_engines() as engines:
        path = run(tmp_path / "run", student, *data, lora_rank=2, objective="jsd")
    (parts,) = engines
    assert parts.teacher_lms[student].model is parts.learner.lm.model is not parts.teacher_lms[teacher].model
    assert all(row[f"teacher/{name}/exact_kl"] > 0 for row in training_rows(path) for name in (student, teacher))
    assert any(value.any() for key, value in weights(final(path)).items() if "lora_B" in key)


# --- rows that name their teacher


@pytest.mark.parametrize("key", ["teacher", "domain"])
def test_a_row_is_judged_by_the_teacher_that_it_names(
    key: str, tmp_path: Path, student: str, teacher: str, second: str
):
    rows = [asking(f"{n}+{n}=", **({key: "math"} if n % 2 else {key: "chat"}), id=n) for n in range(20, 30)]
    path = run(
        tmp_path / "run", student, {"dataset": write(tmp_path / "mixed.jsonl", *rows), "groups_per_batch": 9},
        teachers__0__model=teacher, teachers__0__route_value="math", teachers__1__model=second,
        teachers__1__route_value="chat", route_key=key, max_steps=1,
    )  # fmt: skip
    found = episodes(path, 1)
    assert len({row["row_id"] for row in found}) == 9 == len(found)  # one is held out
    for row in found:
        odd = int(row["row_id"]) % 2
        assert row["teacher"] == ("math" if odd else "chat") and judged_by(row, teacher if odd else second)


def test_rows_that_name_no_teacher_go_to_their_dataset_s(tmp_path: Path, student: str, teacher: str, second: str):
    rows = [asking("1+2=", teacher=second), asking("3+4="), asking("5+6=", teacher=teacher)]
    data = {"dataset": write(tmp_path / "rows.jsonl", *rows), "teacher_model": teacher, "groups_per_batch": 3}
    path = run(tmp_path / "run", student, data, teachers__0__model=second, max_steps=1)
    named = {row["row_id"]: row["teacher"] for row in episodes(path, 1)}
    assert named == {"rows:1": second, "rows:2": teacher, "rows:3": teacher}


def test_one_model_may_read_in_two_ways(tmp_path: Path, student: str, teacher: str):
    data = [
        arithmetic("plain", teacher, eval_size=0),
        arithmetic("hinted", teacher, teacher_system_prompt="12+34=46", eval_size=0),
    ]
    with tiny_models.captured_engines() as engines:
        path = run(tmp_path / "run", student, *data, max_steps=1)
    assert engines[0].teacher_lms.keys() == {teacher, f"{teacher} (hinted)"}
    assert len({id(lm) for lm in engines[0].teacher_lms.values()}) == 1
    for row in episodes(path, 1):
        assert judged_by(row, teacher) == (row["dataset"] == "plain")


# --- blends


def logprobs_of(episode: dict[str, Any]) -> list[float]:
    return [x for x in episode["teacher_logprobs"] if x is not None]


def distributions(episode: dict[str, Any], folder: str) -> torch.Tensor:
    """What this model's plain forward says at the sampled tokens."""
    with torch.no_grad():
        probabilities = plain(folder)(torch.tensor([episode["token_ids"]])).logits[0].softmax(-1)
    return torch.stack([probabilities[i - 1] for i, sampled in enumerate(episode["sampled"]) if sampled])


def chosen(probabilities: torch.Tensor, episode: dict[str, Any]) -> list[float]:
    ids = [token for token, sampled in zip(episode["token_ids"], episode["sampled"], strict=True) if sampled]
    return [float(row[token].log()) for row, token in zip(probabilities, ids, strict=True)]


def mixture(episode: dict[str, Any], weights: dict[str, float], cut: bool = False) -> list[float]:
    """Logprobs of a mixture; `cut`: over the ids that every model has. (One teacher's embedding is padded.)"""
    of = [w * distributions(episode, folder) for folder, w in weights.items()]
    shared = min(each.shape[1] for each in of)
    mixed = torch.stack([each[:, :shared] for each in of]).sum(0)
    return chosen(mixed / mixed.sum(-1, keepdim=True) if cut else mixed, episode)


OBJECTIVES = [
    {"objective": "topk_forward_kl", "top_k": 4},
    {"objective": "jsd", "support": "teacher_topk", "top_k": 4},
    {"objective": "jsd", "beta": 0.5},
    {"objective": "jsd", "support": "student_topk", "top_k": 4},
    {"objective": "reverse_kl"},
]


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_without_routes_all_teachers_are_blended_by_their_weights(
    options: dict[str, Any], tmp_path: Path, student: str, teacher: str, second: str
):
    data = arithmetic("one", "")
    del data["teacher_model"]
    path = run(
        tmp_path / "run", student, data, teachers__0__model=teacher, teachers__0__blend_weight=3,
        teachers__1__model=second, teachers__1__blend_weight=1, max_steps=1, **options,
    )  # fmt: skip
    (step,), found = training_rows(path), episodes(path, 1)
    gaps: dict[str, list[float]] = {teacher: [], second: []}
    known = options.get("support", options["objective"]) not in ("jsd", "student_topk")  # not of whole distributions
    for row in found:
        assert row["teacher"] == "blend"
        expected = mixture(row, {teacher: 0.75, second: 0.25}, cut=not known)
        assert logprobs_of(row) == pytest.approx(expected, abs=1e-4)
        for name, values in gaps.items():
            own, judged = (chosen(distributions(row, folder), row) for folder in (student, name))
            values += [a - b for a, b in zip(own, judged, strict=True)]
    assert step["teacher/blend/kl"] == step["kl"] == step["dataset/one/kl"]
    for name, values in gaps.items():
        assert (f"teacher/{name}/kl" in step) == known
        if known:
            assert step[f"teacher/{name}/kl"] == pytest.approx(sum(values) / len(values), abs=1e-4)
            assert (0 < step.get(f"teacher/{name}/topk_mass", 1) < 1) == ("top_k" in options)
    assert evaluation_rows(path)[0]["eval/exact_reverse_kl"] > 0


@pytest.mark.parametrize("options", [OBJECTIVES[0], OBJECTIVES[2]], ids=str)
def test_a_blend_of_one_and_nothing_is_that_one_to_the_bit_and_the_other_is_not_loaded(
    options: dict[str, Any], tmp_path: Path, student: str, teacher: str, second: str
):
    data = arithmetic("one", "", eval_size=0)
    del data["teacher_model"]
    alone = {"teachers__0__model": teacher, "teachers__0__blend_weight": 1}
    with tiny_models.captured_engines() as engines:
        nobody = {"teachers__1__model": second, "teachers__1__blend_weight": 0}
        runs = [
            run(tmp_path / "one", student, data, **alone, **options),
            run(tmp_path / "two", student, data, **alone, **nobody, **options),
            run(tmp_path / "old", student, arithmetic("one", teacher, eval_size=0), **options),
        ]  # fmt: skip
    assert all(parts.teacher_lms.keys() == {teacher} for parts in engines)
    one, two, old = (fingerprint(path) for path in runs)
    assert one == two == old


def test_two_equal_teachers_blended_are_one_teacher(tmp_path: Path, student: str, teacher: str):
    data = arithmetic("one", "", eval_size=0)
    del data["teacher_model"]
    copy = shutil.copytree(teacher, tmp_path / "copy")
    for i, options in enumerate([OBJECTIVES[0], OBJECTIVES[2]]):
        both = {"teachers__0__model": teacher, "teachers__1__model": copy}
        both |= {"teachers__0__blend_weight": 0.4, "teachers__1__blend_weight": 0.6}
        blended = run(tmp_path / f"blend{i}", student, data, **both, **options)
        alone = run(tmp_path / f"alone{i}", student, arithmetic("one", teacher, eval_size=0), **options)
        for name, values in weights(final(alone)).items():
            torch.testing.assert_close(weights(final(blended))[name], values, rtol=1e-3, atol=1e-4)


def test_routes_and_blends_combined(tmp_path: Path, student: str, teacher: str, second: str):
    rows = [asking("1+2=", teacher="math"), asking("3+4=", teacher="chat"), asking("5+6=", teacher="chat")]
    data = {"dataset": write(tmp_path / "rows.jsonl", *rows), "groups_per_batch": 3}
    path = run(
        tmp_path / "run", student, data, max_steps=1, objective="topk_forward_kl", top_k=4,
        teachers__0__model=student, teachers__0__route_value="math",
        teachers__1__model=teacher, teachers__1__route_value="chat", teachers__1__blend_weight=0.5,
        teachers__2__model=second, teachers__2__route_value="chat", teachers__2__blend_weight=2,
    )  # fmt: skip
    (step,) = training_rows(path)
    for row in episodes(path, 1):
        if row["row_id"] == "rows:1":
            assert row["teacher"] == "math" and judged_by(row, student)
        else:
            assert row["teacher"] == "chat"
            assert logprobs_of(row) == pytest.approx(mixture(row, {teacher: 0.2, second: 0.8}), abs=1e-4)
    assert {"teacher/math/kl", "teacher/chat/kl", f"teacher/{teacher}/kl", f"teacher/{second}/kl"} <= step.keys()


def test_blended_teachers_read_in_formats_of_their_own(tmp_path: Path, student: str, teacher: str):
    """One model under two system prompts: the views differ, the student's positions do not."""
    data = arithmetic("one", "", eval_size=0)
    del data["teacher_model"]
    with tiny_models.captured_engines() as engines:
        path = run(
            tmp_path / "run", student, data, max_steps=1, objective="topk_forward_kl", top_k=4,
            teachers__0__model=teacher, teachers__0__route_value="plain", teachers__0__blend_weight=1,
            teachers__1__model=teacher, teachers__1__route_value="hinted", teachers__1__blend_weight=1,
            teachers__1__system_prompt="12+34=46",
        )  # fmt: skip
    assert engines[0].teacher_lms["plain"] is engines[0].teacher_lms["hinted"]
    (step,) = training_rows(path)
    assert step["teacher/plain/kl"] != step["teacher/hinted/kl"]
    assert not any(judged_by(row, teacher) for row in episodes(path, 1))


# --- stopping and going on


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_never_was(tmp_path: Path, student: str, teacher: str, second: str):
    data = arithmetic("one", teacher), arithmetic("two", second, rows=5)
    options = {"max_steps": 6, "save_every": 2, "keep_checkpoints": 0, "num_substeps": 2}
    whole = run(tmp_path / "whole", student, *data, **options)
    path = tmp_path / "run"
    arguments = argv(path, student, *data, **options)
    for rows in (3, 5):
        process = tiny_models.start(arguments, tmp_path / "output", recipe="on_policy_multi_teacher")
        metrics = path / "metrics.jsonl"
        while process.exitcode is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < rows):
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9
    process = tiny_models.start(arguments, tmp_path / "output", recipe="on_policy_multi_teacher")
    assert tiny_models.finish(process) == 0, (tmp_path / "output").read_text()
    assert fingerprint(path) == fingerprint(whole)


# --- mistakes


def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]) -> str:
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_cli(recipe.main, recipe.Config, presets=recipe.presets, argv=arguments)
    err = capfd.readouterr().err
    assert exit.value.code == 2 and err.count("error:") == 1, err
    assert sorted(tmp_path.rglob("*")) == before
    return err


def test_a_mistyped_route_is_named_by_file_and_line_with_the_known_ones(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, student: str, teacher: str, second: str
):
    routes = {"teachers__0__model": teacher, "teachers__0__route_value": "math", "teachers__1__model": second}
    file = write(tmp_path / "rows.jsonl", asking("1+2=", teacher="math"), asking("3+4=", teacher="maths"))
    err = refused(capfd, tmp_path, argv(tmp_path / "run", student, {"dataset": file}, **routes))
    assert f"{file}:2: teacher is 'maths', which no teacher answers to; did you mean 'math'?" in err
    assert f"expected one of 'math', {second!r}" in err
    file = write(tmp_path / "rows.jsonl", asking("1+2=", teacher="math"), asking("3+4="))
    err = refused(capfd, tmp_path, argv(tmp_path / "run", student, {"dataset": file}, **routes))
    assert f"{file}:2: has no 'teacher', which says who teaches it" in err


def test_one_teacher_among_several_with_another_tokenizer(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, student: str, teacher: str
):
    alien = Path(shutil.copytree(teacher, tmp_path / "alien"))
    content = json.loads((alien / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (alien / "tokenizer.json").write_text(json.dumps(content))
    data = arithmetic("one", teacher), arithmetic("two", str(alien))
    err = refused(capfd, tmp_path, argv(tmp_path / "run", student, *data))
    assert f"teacher {alien}'s" in err and "different meanings" in err


MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown dataset": ({"datasets__1__dataset": "gsm8"}, ("dataset='gsm8' is not known", "did you mean 'gsm8k'?")),
    "unknown option of an entry": (
        {"datasets__0__group_per_batch": 1},
        ("unknown option datasets.0.group_per_batch. Did you mean datasets.0.groups_per_batch?",),
    ),
    "option of one teacher": ({"teacher_model": "x"}, ("unknown option teacher_model", "datasets.0.teacher_model")),
    "not a number": ({"datasets__0__group_size": "x"}, ("datasets.0.group_size=x: expected int",)),
    "too small": ({"datasets__1__groups_per_batch": 0}, ("datasets.1.groups_per_batch=0: expected 1 or more",)),
    "a gap": ({"datasets__3__dataset": "arithmetic"}, ("datasets.2",)),
    "no number": (
        {"datasets__dataset": "x"},
        ("datasets.dataset=x: datasets is a list, counted from 0. Write datasets.0.dataset=x",),
    ),
    "a number in another way": ({"datasets__00__name": "x"}, ("Write datasets.0.name=x",)),
    "a gap of millions": (
        {"datasets__9999999__name": "x"},
        ("datasets.9999999.name=x: datasets is counted from 0 without gaps, and there is no datasets.2",),
    ),
    "an empty teacher": ({"datasets__0__teacher_model": ""}, ("datasets.0.teacher_model is empty",)),
    "no entry": ({"datasets__0": "x"}, ("datasets.0=x: expected datasets.0.OPTION=VALUE",)),
    "one name twice": ({"datasets__1__name": "one"}, ("datasets.0.name and datasets.1.name are both 'one'",)),
    "one route twice": (
        {"teachers__0__model": "a", "teachers__1__model": "b", "teachers__1__route_value": "a"},
        ("teachers.0.route_value and teachers.1.route_value are both 'a'",),
    ),
    "a blend with one who has no weight": (
        {"teachers__0__model": "a", "teachers__0__route_value": "x", "teachers__0__blend_weight": 1,
         "teachers__1__model": "b", "teachers__1__route_value": "x"},
        ("teachers.0.route_value and teachers.1.route_value are both 'x'", "or each a blend_weight"),
    ),
    "a weight for nothing": (
        {"teachers__0__model": "a", "teachers__0__blend_weight": 1, "teachers__1__model": "b"},
        ("teachers.0.blend_weight: no other teacher has its route_value", "teachers.1 has no blend_weight"),
    ),
    "a weight below 0": (
        {"teachers__0__model": "a", "teachers__0__blend_weight": -1}, ("teachers.0.blend_weight=-1.0: expected",)
    ),
    "all weights 0": (
        {"teachers__0__model": "a", "teachers__0__blend_weight": 0}, ("blend_weight is 0: nobody is left to ask",)
    ),
    "weights that overflow": (
        {"teachers__0__model": "a", "teachers__0__blend_weight": 1e308, "teachers__1__model": "b",
         "teachers__1__blend_weight": 1e308},
        ("the blend_weights of 'blend' are too far apart",),
    ),
    "a weight that vanishes": (
        {"teachers__0__model": "a", "teachers__0__blend_weight": 1e-320, "teachers__1__model": "b",
         "teachers__1__blend_weight": 1e10},
        ("the blend_weights of 'blend' are too far apart",),
    ),
    "the name of the blend": (
        {"teachers__0__model": "a", "teachers__0__blend_weight": 1, "teachers__0__route_value": "blend"},
        ("teachers.0.route_value=blend",),
    ),
    "weight": ({"datasets__1__weight": 0}, ("datasets.1.weight=0.0: expected a positive number",)),
    "substeps": ({"num_substeps": 7}, ("num_substeps=7: there are only 6 groups",)),
    "shorthand": ({"deepmath_groups_per_batch": 5}, ("use datasets.0.groups_per_batch",)),
    "template kwargs": (
        {"datasets__1__teacher_chat_template_kwargs": "{"}, ("datasets.1.teacher_chat_template_kwargs={: not JSON",)
    ),
    "no such teacher": ({"datasets__1__teacher_model": "./nowhere"}, ("./nowhere: no such folder",)),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, student: str, teacher: str):
    options, parts = MISTAKES[case]
    data = arithmetic("one", teacher), arithmetic("two", teacher)
    err = refused(capfd, tmp_path, argv(tmp_path / "run", student, *data, **options))
    for part in parts:
        assert part in err, err


def test_a_dataset_without_any_teacher(capfd: pytest.CaptureFixture[str], tmp_path: Path, student: str, teacher: str):
    data = {"dataset": "arithmetic"}
    assert "datasets.0 has no teacher" in refused(capfd, tmp_path, argv(tmp_path / "run", student, data))
    err = refused(capfd, tmp_path, argv(tmp_path / "run", student, data, teachers__0__model=teacher))
    assert "arithmetic: its rows say no teacher" in err
    told = {"dataset": "arithmetic", "teacher_system_prompt": "add"}
    err = refused(capfd, tmp_path, argv(tmp_path / "run", student, told, teachers__0__model=teacher))
    assert "datasets.0.teacher_system_prompt needs datasets.0.teacher_model" in err


def test_without_datasets_it_is_deepmath_and_tulu3():
    config = parse_config(recipe.Config, ["tulu3_groups_per_batch=32"], presets=recipe.presets)
    assert [(data.title, data.groups_per_batch) for data in config.datasets] == [("deepmath", 256), ("tulu3", 32)]
    assert len(config.teacher_specs()) == 2
    shown = help_text(recipe.Config, recipe.presets, [])
    assert "datasets.N.dataset=deepmath, tulu3 (preset)" in shown and "teachers.N.route_value=None" in shown


def test_a_dry_run_says_who_judges_what(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, student: str, teacher: str, second: str
):
    data = arithmetic("one", teacher), arithmetic("two", second)
    run(tmp_path / "run", student, *data, dry_run=True)
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for part in ("datasets.1.name=two", f"12 rows are judged by {second}", f"teacher {teacher} parameters:"):
        assert part in out, out
    del data[0]["teacher_model"]
    both: dict[str, Any] = {"teachers__0__model": teacher, "teachers__1__model": second}
    both |= {"teachers__0__blend_weight": 3, "teachers__1__blend_weight": 1}
    run(tmp_path / "run", student, data[0], dry_run=True, **both)
    out = capsys.readouterr().out
    assert f"12 rows are judged by blend: 0.75 of {teacher}, 0.25 of {second}" in out
    assert re.search(rf"{teacher} reads (\d+) tokens of this prompt, {second} reads \1 tokens", out)


def test_the_options_of_one_teacher_exist_once():
    theirs, own = chz.chz_fields(TrainConfig), chz.chz_fields(OneTeacher)
    for config in (DatasetOptions, TrainConfig, evaluate.Config, capture_teacher.Config):
        assert own and all(chz.chz_fields(config)[name] is field for name, field in own.items())
    assert {name for name in theirs if name.startswith("teacher_")} - own.keys() == {
        "teacher_alignment", "teacher_ema_decay", "teacher_temperature",
    }  # fmt: skip
    for refused in ({"lora_rank": -1}, {"max_dropped_fraction": 2}, {"teacher_checkpoint": "x"}):  # by each base's own
        with pytest.raises(ConfigError):
            TrainConfig(model_name="s", teacher=ServerOptions(url=("http://a:1",)), **refused)
