"""Served teachers in company: of each other, of one that is loaded here, of bytes, of given answers, of tools."""

# ruff: noqa: F811 (fixtures of other files, and what is given them)

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_harbor_recipes as harbor
import test_on_policy_multi_teacher as several
import tiny_models
from scripted_shell_run import Records, ScriptedSampler
from test_harbor_recipes import sandboxes, tool_models  # noqa: F401 (fixtures)
from test_on_policy_multi_teacher import arithmetic, second  # noqa: F401 (second is a fixture)
from test_other_tokenizers import BYTES, pair  # noqa: F401 (pair is a fixture)
from test_own_service import models_of
from tiny_models import EVALUATED, REVERSE_KL, captured_engines, evaluation_rows, run, training_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # the service that its own tests use

from scripted_teacher import ScriptedTeacher
from teacher_services import TOKEN, Running, running
from tiny import plain_logits

from errors import ConfigError, ModelError
from models.teacher_service import hosting
from recipes import capture_teacher, evaluate, replay, samplers
from recipes.cli import parse_config

TOP_K = {"objective": "topk_forward_kl", "top_k": 4}
FULL = {"objective": "jsd", "beta": 0.5}


def slow(options: dict[str, Any]) -> Any:
    return pytest.param(options, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTEGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MY_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def service(teacher: str, second: str) -> Iterator[Running]:
    with running(*models_of(teacher, second)) as service:
        yield service


def own(service: Running, folder: str, prefix: str = "teacher.") -> dict[str, Any]:
    """Options of a teacher on our own service."""
    return {
        f"{prefix}url": service.url, f"{prefix}served_model": Path(folder).name, f"{prefix}token_env": "MY_TOKEN",
    }  # fmt: skip


def plain(folder: str, **options: Any) -> ScriptedTeacher:
    """Something that answers as `vllm serve` does."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    given = {"tokenizer": AutoTokenizer.from_pretrained(folder), "root": folder, "max_model_len": 4096, **options}
    return ScriptedTeacher(partial(plain_logits, model), model.config.vocab_size, **given)


def same_kl(first: Path, second: Path, rel: float = 0.02, key: str = "kl") -> None:
    near, far = training_rows(first), training_rows(second)
    assert [row["trained_tokens"] for row in near] == [row["trained_tokens"] for row in far]
    assert [row[key] for row in far] == pytest.approx([row[key] for row in near], rel=rel, abs=2e-3)


# --- blends


def blend(path: Path, student: str, teacher: str, second: str, options: dict[str, Any], **where: Any) -> Path:
    data = arithmetic("one", "")
    del data["teacher_model"]
    given = {"teachers.0.model": teacher, "teachers.1.model": second, **where, **options}
    return several.run(
        path, student, data, max_steps=1, teachers__0__blend_weight=3, teachers__1__blend_weight=1, **given
    )


@pytest.mark.parametrize("options", [slow(REVERSE_KL), slow(TOP_K), FULL], ids=str)
def test_a_blend_is_the_same_wherever_its_teachers_are(
    tmp_path: Path,
    student: str,
    teacher: str,
    second: str,
    service: Running,
    options: dict[str, Any],
):
    near = blend(tmp_path / "near", student, teacher, second, options)
    first, other = own(service, teacher, "teachers.0."), own(service, second, "teachers.1.")
    for name, where in (("all", {**first, **other}), ("one", first)):
        with captured_engines() as engines:
            far = blend(tmp_path / name, student, teacher, second, options, **where)
        assert len(engines[0].teacher_lms) == 2 - len(where) // 3
        same_kl(near, far)
        before, after = (evaluation_rows(path)[0]["eval/exact_reverse_kl"] for path in (near, far))
        assert after == pytest.approx(before, rel=0.02)


def test_a_blend_of_a_plain_server_and_our_own(tmp_path: Path, student: str, second: str, service: Running):
    unpadded = tiny_models.make_model(tmp_path / "unpadded", seed=2, hidden=24)
    near = blend(tmp_path / "near", student, unpadded, second, TOP_K)
    with plain(unpadded) as server:
        where = {"teachers.0.url": server.url, **own(service, second, "teachers.1.")}
        far = blend(tmp_path / "far", student, unpadded, second, TOP_K, **where)
        same_kl(near, far)
        row = evaluation_rows(far)[0]
        assert "eval/reverse_kl" in row and "eval/exact_reverse_kl" not in row, (
            "one of them gives no whole distributions"
        )
        with (
            captured_engines() as engines,
            pytest.raises(
                ConfigError, match=r"plain vLLM server.*It can serve objective=reverse_kl, .*support=sampled"
            ),
        ):
            blend(tmp_path / "refused", student, unpadded, second, FULL, **where)
        assert not engines and not (tmp_path / "refused").exists()


# --- another tokenizer


def test_bytes_are_compared_with_a_served_teacher_too(tmp_path: Path, pair: dict[str, str]):
    options = {**BYTES, **EVALUATED, "group_size": 2, "max_steps": 1}
    near = run(tmp_path / "near", pair, **options)
    with running(*models_of(pair["teacher_model"])) as service:
        far = run(tmp_path / "far", pair, **options, **own(service, pair["teacher_model"]))
        same_kl(near, far, rel=1e-3)
    with plain(pair["teacher_model"]) as server:
        far = run(tmp_path / "plain", pair, **options, **{"teacher.url": server.url})
        same_kl(near, far, rel=1e-3)
    for path in (near, far):
        assert "eval/reverse_kl" in evaluation_rows(path)[0]


# --- given answers


@pytest.mark.parametrize("options", [{}, slow({"support": "teacher_topk", "top_k": 4, "tail": "renormalise"})], ids=str)
def test_classic_distillation_from_a_served_teacher(
    tmp_path: Path, models: dict[str, str], teacher: str, service: Running, options: dict[str, Any]
):
    given = {"objective": "kd", "alpha": 0.25, "loss_temperature": 2.0, "eval_size": 0, "max_steps": 1, "lmbda": 0.0}
    near = run(tmp_path / "near", models, **given, **options)
    far = run(tmp_path / "far", models, **given, **options, **own(service, teacher))
    for key in ("loss", "forward_kl"):
        same_kl(near, far, key=key)


def test_classic_distillation_from_a_plain_server(tmp_path: Path, student: str):
    unpadded = tiny_models.make_model(tmp_path / "unpadded", seed=2, hidden=24)
    models = {"model_name": student, "teacher_model": unpadded}
    given = {"objective": "kd", "eval_size": 0, "max_steps": 1, "lmbda": 0.0}
    top = {"support": "teacher_topk", "top_k": 4}
    near = run(tmp_path / "near", models, **given, **top)
    with plain(unpadded) as server:
        far = run(tmp_path / "far", models, **given, **top, **{"teacher.url": server.url})
        same_kl(near, far, key="loss")
        with pytest.raises(ConfigError, match="objective=kd with support=teacher_topk"):
            run(tmp_path / "refused", models, **given, **{"teacher.url": server.url})
        assert not (tmp_path / "refused").exists()


# --- tools


SEVERAL_TURNS = {"max_steps": 1, "max_tokens": 150, "max_turns": 3}


@pytest.fixture
def working(tmp_path: Path, sandboxes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Students whose turns are scripts that call their tool."""
    monkeypatch.setattr(ScriptedSampler, "records", Records(tmp_path / "records"), raising=False)
    monkeypatch.setattr(samplers, "TransformersSampler", ScriptedSampler)


@pytest.mark.usefixtures("working")
@pytest.mark.parametrize("options", [slow(REVERSE_KL), FULL], ids=str)
def test_episodes_with_tools_are_judged_by_a_served_teacher(
    tmp_path: Path, tool_models: dict[str, str], options: dict[str, Any]
):
    folder, given = tool_models["teacher_model"], {**SEVERAL_TURNS, **options}
    near = harbor.run(tmp_path / "near", tool_models, **given)
    with running(*models_of(folder)) as service:
        far = harbor.run(tmp_path / "far", tool_models, **given, **own(service, folder))
    same_kl(near, far)
    for episode in tiny_models.episodes(far, 1):
        scored = [value is not None for value in episode["teacher_logprobs"]]
        assert scored == episode["sampled"] and turns_of(episode) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("working")
def test_episodes_with_tools_are_judged_by_a_plain_server(tmp_path: Path, tool_models: dict[str, str]):
    given = {**SEVERAL_TURNS, **TOP_K}
    near = harbor.run(tmp_path / "near", tool_models, **given)
    with plain(tool_models["teacher_model"]) as server:
        far = harbor.run(tmp_path / "far", tool_models, **given, **{"teacher.url": server.url})
    same_kl(near, far)
    assert all(turns_of(episode) > 1 for episode in tiny_models.episodes(far, 1))


def turns_of(episode: dict[str, Any]) -> int:
    """How often what the student sampled begins."""
    return sum(now and not before for before, now in itertools.pairwise(episode["sampled"]))


# --- other recipes


@pytest.mark.slow
def test_captures_replays_and_evaluations_of_our_own_service_are_those_of_the_teacher_here(
    tmp_path: Path, models: dict[str, str], teacher: str, service: Running
):
    rows = [{"messages": [{"role": "user", "content": f"1{i}+2"}], "completion": f"={i + 12}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    saved = run(tmp_path / "saved", models, eval_size=0, max_steps=1, **REVERSE_KL)
    found: list[tuple[Any, Any, Any]] = []
    for i, where in enumerate(({}, own(service, teacher))):
        common = {**models, **where, "device": "cpu"}
        captured = tmp_path / f"captured{i}.jsonl"
        given = {"dataset": tmp_path / "rows.jsonl", "top_k": 4, "output_path": captured}
        call(capture_teacher, common | given)
        call(replay, common | {"saved": saved, "log_path": tmp_path / f"again{i}", "learning_rate": 1e-2, **FULL})
        call(evaluate, common | {"eval_size": 8, "max_tokens": 6, "output_path": tmp_path / f"numbers{i}.json"})
        lines = [json.loads(line) for line in captured.read_text().splitlines()[1:]]
        numbers = json.loads((tmp_path / f"numbers{i}.json").read_text())
        found.append((lines, training_rows(tmp_path / f"again{i}"), numbers))
    (lines, again, numbers), (far_lines, far_again, far_numbers) = found
    for near, far in zip(lines, far_lines, strict=True):
        assert near["topk_ids"] == far["topk_ids"]
        for a, b in zip(near["topk_logprobs"], far["topk_logprobs"], strict=True):
            assert b == pytest.approx(a, abs=1e-4)
    assert [row["kl"] for row in far_again] == pytest.approx([row["kl"] for row in again], rel=0.02)
    exact = "eval/exact_reverse_kl"
    assert far_numbers[exact] == pytest.approx(numbers[exact], rel=0.02)


def call(recipe: Any, given: dict[str, Any]) -> None:
    presets = {"presets": recipe.presets} if hasattr(recipe, "presets") else {}
    with tiny_models.no_report():
        recipe.main(parse_config(recipe.Config, [f"{key}={value}" for key, value in given.items()], **presets))


# --- what a teacher cannot give, and what is not known of it


def test_a_teacher_whose_head_cannot_be_sent_serves_what_needs_none(
    tmp_path: Path, models: dict[str, str], teacher: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    def no_head(lm: Any) -> Any:
        raise ModelError("Strange: the head does more than a linear layer")

    monkeypatch.setattr(hosting, "take_head", no_head)
    local = run(tmp_path / "near", models, max_steps=1, **REVERSE_KL)
    with running(*models_of(teacher)) as service, caplog.at_level(logging.WARNING):
        given = own(service, teacher)
        path = run(tmp_path / "far", models, max_steps=1, **given, **EVALUATED, **REVERSE_KL)
        same_kl(local, path)
        (said,) = [record.getMessage() for record in caplog.records if "whole distributions" in record.getMessage()]
        assert "Strange: the head does more" in said and "KL of sampled tokens" in said
        row = evaluation_rows(path)[0]
        assert "eval/reverse_kl" in row and "eval/exact_reverse_kl" not in row
        with (
            captured_engines() as engines,
            pytest.raises(ConfigError, match=r"Strange: .*It can serve objective=reverse_kl"),
        ):
            run(tmp_path / "refused", models, **given, **FULL)
        assert not engines and not (tmp_path / "refused").exists()


def test_a_server_that_cannot_say_what_its_ids_mean_is_told_and_kept(tmp_path: Path, student: str, caplog: Any):
    unpadded = tiny_models.make_model(tmp_path / "unpadded", seed=2, hidden=24)
    with plain(unpadded, tokenizer=None) as server, caplog.at_level(logging.WARNING):
        given = {"teacher.url": server.url, "max_steps": 1, **REVERSE_KL}
        path = run(tmp_path / "run", {"model_name": student, "teacher_model": unpadded}, **given)
        (said,) = [record.getMessage() for record in caplog.records if "unconfirmed" in record.getMessage()]
        assert f"{server.url} cannot say which tokenizer it has" in said and unpadded in said
        kept = json.loads((path / "config.json").read_text())["config"]["served_teachers"]
        assert "cannot say which tokenizer it has" in kept[unpadded]
    with plain(unpadded) as moved:  # at another address, and with a tokenizer: the run goes on
        given |= {"teacher.url": moved.url, "max_steps": 2}
        run(path, {"model_name": student, "teacher_model": unpadded}, **given)
    assert [row["step"] for row in training_rows(path)] == [1, 2]
