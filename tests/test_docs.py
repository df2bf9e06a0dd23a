"""README.md, CONTRIBUTING.md and docs/ tell the truth: code runs, and options, links and names exist.

The blocks of one page run in order, in one empty folder and one namespace, as a reader would run them, but
with models, batches and step counts small enough for seconds. Commands that need models from elsewhere are
parsed and not run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from envs import arithmetic
from envs.datasets import parse_row
from envs.sources import JSONL_SUFFIXES, locate
from errors import UserError
from recipes import (
    capture_teacher,
    embedded,
    evaluate,
    off_policy_reasoning,
    offline_distillation,
    on_policy_distillation,
    on_policy_multi_teacher,
    replay,
    training_run,
)
from recipes.cli import Option, options, parse_config
from recipes.teachers import EMA
from training import loop

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_OF_IT_RUNS = {"distil-your-own-prompts.md", "distribution-losses-and-capture.md", "several-teachers.md"}
CODE = (
    "*.py",
    *(
        f"{folder}/**/*.py"
        for folder in ("envs", "sandbox", "tool_use", "models", "training", "recipes", "benchmarks", "tests")
    ),
)
RUN_HERE = (
    evaluate,
    on_policy_distillation,
    capture_teacher,
    offline_distillation,
    on_policy_multi_teacher,
    off_policy_reasoning,
    replay,
)  # the others need an engine for containers, or have tests of their own
SHRINK = 50
"""100 steps become 2, the checkpoint `step_000100` becomes `step_000002`, and `[:2000]` rows become 40."""

of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# --- reading a page


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]


def spans(page: str) -> list[str]:
    """What stands in single backticks, outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE))


def commands(shell: str) -> Iterator[list[str]]:
    """Each command's words, without comments, continued lines joined."""
    for line in shell.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


# --- commands


def recipe_of(words: list[str]) -> str | None:
    """`recipes.NAME`, if that is what the command runs."""
    return words[2] if words[:2] == [".venv/bin/python", "-m"] and words[2].startswith("recipes.") else None


def parse(module: ModuleType, argv: list[str]) -> Any:
    """The config that a command gives. A path to data need not exist; a named dataset must."""
    datasets = [found[1] for pair in argv if (found := re.fullmatch(r"(?:datasets\.\d+\.)?dataset=(.*)", pair))]
    named = [dataset for dataset in datasets if not ("/" in dataset or dataset.endswith(JSONL_SUFFIXES))]
    for dataset in named:
        locate(dataset, None)
    presets = None if len(named) < len(datasets) else getattr(module, "presets", None)
    return parse_config(module.Config, argv, presets=presets)


def command_problem(words: list[str]) -> str | None:
    """What is wrong with a command of ours; None for anything else's."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        missing = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"the Makefile has no {missing}" if missing else None
    if words[:2] != [".venv/bin/python", "-m"]:
        return None
    if importlib.util.find_spec(words[2]) is None:
        return f"there is no module {words[2]}"
    if words[2].partition(".")[0] not in ("recipes", "benchmarks") or "--help" in words:
        return None
    try:
        parse(importlib.import_module(words[2]), words[3:])
    except UserError as error:
        return f"{shlex.join(words)}: {error}"
    return None


@of_each_page
def test_every_command_and_every_option_in_it_exists(page: Path):
    shell = [block.text for block in blocks(page.read_text()) if block.language in ("bash", "sh", "shell")]
    assert [problem for text in shell for words in commands(text) if (problem := command_problem(words))] == []


@of_each_page
def test_every_json_row_obeys_the_contract(page: Path):
    for block in blocks(page.read_text()):
        if block.language == "json":
            for line in block.text.splitlines():
                parse_row(json.loads(line), page.name)


# --- running a page


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small(cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and embedded models that are made in a moment."""
    tiny = {name: replace(recipe, hidden=16, steps=2, batch=4) for name, recipe in embedded.RECIPES.items()}
    monkeypatch.setattr(embedded, "RECIPES", tiny)
    monkeypatch.setattr(embedded, "rows", lambda split: arithmetic.rows(split)[:40])
    monkeypatch.setenv("PROTEGE_CACHE", str(cache_folder))
    for module in (loop, training_run):  # a second each, and tested in test_report.py
        monkeypatch.setattr(module, "write_report", lambda path: None)
    monkeypatch.chdir(tmp_path)


def shrunk(text: str) -> str:
    text = re.sub(r"\bmax_steps=(\d+)", lambda n: f"max_steps={max(1, int(n[1]) // SHRINK)}", text)
    text = re.sub(r"\[:(\d{3,})\]", lambda n: f"[:{int(n[1]) // SHRINK}]", text)
    return re.sub(r"\bstep_(\d{6})", lambda n: f"step_{max(1, int(n[1]) // SHRINK):06d}", text)


def overrides(module: ModuleType, argv: list[str]) -> list[str]:
    small: dict[str, Any] = {"device": "cpu"}
    if module in (evaluate, on_policy_distillation, on_policy_multi_teacher, off_policy_reasoning):
        small |= {"max_tokens": 8}
    if module in (evaluate, on_policy_distillation):
        small |= {"eval_size": 8, "sampler_slots": 8}
    if module is on_policy_distillation:
        small |= {"groups_per_batch": 4, "eval_every": 0, "eval_teacher": False}
    if module in (on_policy_distillation, capture_teacher):
        small |= {"max_rows": 40}
    if module is on_policy_multi_teacher:
        entries = {re.match(r"datasets\.\d+\.", pair)[0] for pair in argv if pair.startswith("datasets.")}  # type: ignore[index]
        small |= {
            f"{entry}{name}": size for entry in entries for name, size in (("groups_per_batch", 4), ("eval_size", 8))
        }
    if module is off_policy_reasoning:
        small |= {"batch_size": 4, "eval_size": 8}
    if module in (on_policy_distillation, offline_distillation):
        small |= {} if any(pair.startswith("max_steps=") for pair in argv) else {"max_steps": 2}
    return [f"{name}={value}" for name, value in small.items()]


def is_here(config: Any) -> bool:
    """Whether models and data are embedded, or files that this page has made."""
    models = ("model_name", "teacher_model", "load_checkpoint_path", "teacher_checkpoint")
    parts = [config, *getattr(config, "datasets", ()), *getattr(config, "teachers", ())]
    names = [getattr(part, model, None) for part in parts for model in (*models, "model")]
    given = [
        [getattr(part, key, None) for key in ("capture_path", "saved", "dataset_path", "dataset")] for part in parts
    ]
    data = [next(filter(None, names)) for names in given if any(names)]
    return all(name == "arithmetic" or Path(name).exists() for name in data) and all(
        name.startswith(embedded.PREFIX) or name == EMA or Path(name).exists() for name in names if name is not None
    )


def run_page(page: str) -> list[str]:
    """Run what can be run here. Returns the commands of recipes that cannot."""
    namespace: dict[str, Any] = {}
    left_out = []
    for block in blocks(page):
        if block.language == "python":
            exec(compile(shrunk(block.text), "a python block", "exec"), namespace)
        for words in commands(shrunk(block.text)) if block.language == "bash" else ():
            name = recipe_of(words)
            if name is None or "--help" in words:
                continue
            module, argv = importlib.import_module(name), words[3:]
            if module in RUN_HERE and is_here(config := parse(module, [*argv, *overrides(module, argv)])):
                module.main(config)
            else:
                left_out.append(shlex.join(words))
    return left_out


@of_each_page
def test_the_code_runs_in_order(page: Path, small: None):
    left_out = run_page(page.read_text())
    assert page.name not in ALL_OF_IT_RUNS or left_out == []


# --- links


def headings(page: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def link_problems(page: str, folder: Path) -> list[str]:
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = folder / path
        if path and not there.exists():
            problems.append(f"{target}: no such file")
        elif anchor and anchor not in headings(there.read_text() if path else page):
            problems.append(f"{target}: no such heading")
    return problems


@of_each_page
def test_every_relative_link_leads_somewhere(page: Path):
    assert link_problems(page.read_text(), page.parent) == []


# --- names in backticks


@cache
def sources() -> dict[str, str]:
    """Every file of code by its path, but for this one."""
    paths = {path for pattern in CODE for path in ROOT.glob(pattern)} - {Path(__file__)}
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)}


@cache
def trees() -> dict[str, ast.Module]:
    return {path: ast.parse(text) for path, text in sources().items()}


@cache
def everything() -> str:
    return "\n".join([*sources().values(), *((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))])


@cache
def all_words() -> set[str]:
    return set(re.findall(r"\w+", everything()))


@cache
def definitions() -> dict[str, list[tuple[str, str]]]:
    """Of every class and function: the files that define it, and what stands in it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path, tree in trees().items():
        lines = sources()[path].splitlines()
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.setdefault(node.name, []).append((path, "\n".join(lines[node.lineno - 1 : node.end_lineno])))
    return found


def is_word(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def dotted_problem(name: str) -> str | None:
    """`package.module.Class.attribute`, or from any part of it on."""
    parts = name.split(".")
    module = next((p for n in range(len(parts), 0, -1) if (p := "/".join(parts[:n]) + ".py") in sources()), None)
    rest = parts[module.count("/") + 1 :] if module else parts
    if not rest:
        return None
    places = [text for path, text in definitions().get(rest[0], []) if module in (None, path)]
    if not places and module is None:
        return None if name in everything() else f"{name}: found nowhere"
    if not places and not is_word(rest[0], sources()[module or ""]):
        return f"{name}: {module} has no {rest[0]}"
    if len(rest) > 1 and not any(is_word(rest[1], text) for text in places):
        return f"{name}: {rest[0]} has no {rest[1]}"
    return None


def option_problem(pair: str) -> str | None:
    key, _, value = pair.partition("=")
    general = re.sub(r"(?<=\.)\d+(?=\.)", "N", key)  # as `--help` lists the options of a list's entries
    types = [option.type for option in all_options() if option.name == general]
    if not types:
        return f"{pair}: no recipe has this option"
    choices = [typing.get_args(t) if typing.get_origin(t) is typing.Literal else None for t in types]
    fits = not value or any(among is None or value in among for among in choices)
    return None if fits else f"{pair}: expected one of {choices}"


@cache
def all_options() -> list[Option]:
    """Of every recipe."""
    recipes = [importlib.import_module(f"recipes.{path.stem}") for path in (ROOT / "recipes").glob("[a-z]*.py")]
    return [option for recipe in recipes if hasattr(recipe, "Config") for option in options(recipe.Config)]


def path_problem(path: str) -> str | None:
    file, _, test = path.partition("::")
    if not list(ROOT.glob(file.rstrip("/"))):
        return f"{path}: no such file"
    return f"{path}: no such test" if test and not is_word(test, (ROOT / file).read_text()) else None


def span_problem(span: str) -> str | None:
    """None for what exists, and for what is no name of ours: prose, symbols, hub ids, other programs."""
    pairs = span.split()
    if all(re.fullmatch(r"[a-z][\w.]*=(?![=\"'])\S*", pair) for pair in pairs):
        return next((problem for pair in pairs if (problem := option_problem(pair))), None)
    if pairs[0] in ("make", ".venv/bin/python"):
        return command_problem(pairs)
    name = re.sub(r"\(.*\)$", "", span)
    is_hub_id = re.match(r"[A-Z][\w-]*/", name)
    if len(name) < 3 or is_hub_id or not re.fullmatch(r"[A-Za-z.][\w./:*-]*", name) or name.startswith(".venv"):
        return None
    top = name.partition("/")[0].partition("::")[0]
    if name.endswith((".py", ".md")) or ("/" in name and (ROOT / top).is_dir()):
        return path_problem(name)
    if re.fullmatch(r"\w+(\.\w+)+", name) and Path(name).suffix not in (".json", ".jsonl", ".html", ".gguf"):
        return dotted_problem(name)
    if re.fullmatch(r"\w+", name):
        return None if name in all_words() else f"{name}: found nowhere"
    return None if name in everything() or "-" in name else f"{name}: found nowhere"


@of_each_page
def test_every_name_in_backticks_exists(page: Path):
    text = page.read_text()
    code = "\n".join(block.text for block in blocks(text))
    problems = [problem for span in spans(text) if span not in code and (problem := span_problem(span))]
    assert problems == []


# --- what architecture.md says of the layers


LAYERS = [
    "sandbox",
    "envs",
    "tool_use",
    "envs.harbor",
    "models",
    "training",
    "recipes",
]  # each may import what stands before it


def layer(module: str) -> int | None:
    """The place in `LAYERS` of a module or of a file's path, None for what is not ours."""
    parts = module.removesuffix(".py").replace("/", ".").split(".")
    name = "envs.harbor" if parts[:2] == ["envs", "harbor"] else parts[0]
    return LAYERS.index(name) if name in LAYERS else None


def imports_of(path: str) -> set[str]:
    nodes = list(ast.walk(trees()[path]))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_nothing_imports_upwards_but_for_the_sampler_protocol():
    upwards = [
        (path, module)
        for path in sources()
        if (own := layer(path)) is not None
        for module in sorted(imports_of(path))
        if (other := layer(module)) is not None and other > own
    ]
    assert upwards == [("envs/rollout.py", "models.types")]


@pytest.mark.parametrize("path", ["models/attention.py", "models/causal_lm.py", "models/generation.py"])
def test_the_engine_room_knows_nothing_of_episodes(path: str):
    assert not any(module.startswith("envs") for module in imports_of(path))


# --- the checks themselves


@pytest.mark.parametrize(
    "command",
    [
        "make dema",
        ".venv/bin/python -m recipes.distillation",
        ".venv/bin/python -m recipes.on_policy_distillation learning_rat=1",
        ".venv/bin/python -m recipes.on_policy_distillation model_name=embedded:student \\\n    dry_rum=True",
        ".venv/bin/python -m recipes.on_policy_distillation dataset=gsm8kk",
        ".venv/bin/python -m recipes.evaluate model_name=m lora_rank=3  # only training has it",
    ],
)
def test_a_wrong_command_is_found(command: str):
    assert [command_problem(words) for words in commands(command)] != [None]


@pytest.mark.parametrize(
    "span",
    [
        "lora_rnk=32",
        "objective=jds",
        "training/loops.py",
        "tests/models/test_checks.py::test_nothing_of_this_name",
        "envs/types/",
        "training.packing.PackedBatch.rowz",
        "training.packing.Packedbatch",
        "Episode.sampledd",
        "TeacherViews",
        "token_weight_of(items)",
        "metrics.jsonlines",
        "ratio/meen",
    ],
)
def test_a_wrong_name_is_found(span: str):
    assert span_problem(span) is not None


def test_a_wrong_link_is_found():
    page = "# One heading\n[a](../README.md) [b](gone.md) [c](#one-heading) [d](#two) [e](https://x.y)"
    assert link_problems(page, ROOT / "docs") == ["gone.md: no such file", "#two: no such heading"]


def test_code_that_does_not_run_is_found(small: None):
    recipe = ".venv/bin/python -m recipes"
    assert run_page(f"```bash\n{recipe}.evaluate model_name=Qwen/Qwen3-8B\n```\n") != []
    with pytest.raises(NameError):
        run_page("```python\nundefined\n```\n")
    with pytest.raises(UserError):
        run_page(f"```bash\n{recipe}.on_policy_distillation model_name=embedded:students dry_run=True\n```\n")
