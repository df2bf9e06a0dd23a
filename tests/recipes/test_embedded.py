"""The demo's models: made once, whole, whoever else makes them at the same time."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny_models  # noqa: F401  (one thread)
from transformers import AutoModelForCausalLM, AutoTokenizer

from envs.arithmetic import completion, rows
from envs.datasets import Row
from errors import ConfigError
from recipes import embedded

TINY = {"teacher": embedded.Recipe(hidden=8, layers=1, heads=1, steps=1, batch=4, learning_rate=1e-3, seed=1)}


def few(split: Literal["train", "test"]) -> list[Row]:
    return rows(split)[:50]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTEGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "RECIPES", TINY)
    monkeypatch.setattr(embedded, "rows", few)
    return tmp_path / "cache" / "embedded"


def test_made_once_then_cached(cache: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    folder = embedded.resolve("embedded:teacher", said.append)
    assert len(said) == 1 and "once" in said[0] and folder in said[0]
    assert [path.name for path in cache.iterdir()] == [Path(folder).name]
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template

    monkeypatch.setattr(embedded, "_make", lambda *_: pytest.fail("made again"))
    assert embedded.resolve("embedded:teacher", lambda text: pytest.fail(text)) == folder


def test_a_changed_recipe_is_another_model(monkeypatch: pytest.MonkeyPatch):
    first = embedded.resolve("embedded:teacher", lambda text: None)
    monkeypatch.setattr(embedded, "RECIPES", {"teacher": replace(TINY["teacher"], steps=2)})
    second = embedded.resolve("embedded:teacher", lambda text: None)
    assert first != second and Path(first).exists()


def test_the_same_seed_makes_the_same_weights_and_leaves_the_global_generator_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    contents = []
    for place in ("a", "b"):
        monkeypatch.setenv("PROTEGE_CACHE", str(tmp_path / place))
        torch.manual_seed(len(contents))
        expected = torch.rand(1)
        torch.manual_seed(len(contents))
        contents.append(Path(embedded.resolve("embedded:teacher", print), "model.safetensors").read_bytes())
        assert torch.equal(torch.rand(1), expected)
    assert contents[0] == contents[1]


def test_other_names_pass_through_and_unknown_ones_are_refused(cache: Path):
    assert embedded.resolve("org/model") == "org/model"
    with pytest.raises(ConfigError, match="embedded:genius: expected one of embedded:teacher"):
        embedded.resolve("embedded:genius")
    assert not cache.exists()


def test_a_failure_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(recipe: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_make", fails)
    with pytest.raises(KeyboardInterrupt):
        embedded.resolve("embedded:teacher", lambda text: None)
    assert list(cache.iterdir()) == []


def _resolve(cache: str, go: Any, results: Any) -> None:
    import os

    os.environ["PROTEGE_CACHE"] = cache
    embedded.RECIPES, embedded.rows = TINY, few
    make = embedded._make

    def slowly(recipe: embedded.Recipe, folder: Path) -> None:
        make(recipe, folder)
        go.wait(30)  # both have made theirs before either puts it in place
        time.sleep(0.01)

    embedded._make = slowly
    results.put(embedded.resolve("embedded:teacher", lambda text: None))


def test_two_processes_at_once_both_get_a_whole_folder(cache: Path, tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    go, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_resolve, args=(str(tmp_path / "cache"), go, results)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert folders[0] == folders[1] and [str(path) for path in cache.iterdir()] == folders[:1]
    AutoModelForCausalLM.from_pretrained(folders[0])


def test_the_task_fits_the_models():
    tokenizer: Any = embedded.char_tokenizer()
    for row in rows("test")[:50]:
        prompt = tokenizer.apply_chat_template(list(row.messages), add_generation_prompt=True)["input_ids"]
        assert tokenizer.unk_token_id not in prompt
        answer = tokenizer.encode(row.completion, add_special_tokens=False)
        assert tokenizer.unk_token_id not in answer and tokenizer.decode(answer) == row.completion
    assert completion(47, 38) == "7+8=15,4+3+1=08;85"
