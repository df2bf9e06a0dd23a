"""Sets of tasks: where they are found, under which ids, in which splits, and what is said about them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from test_harbor_task import make_task

from envs.datasets import Cursor
from envs.harbor.dataset import STARTER, load_harbor_dataset
from errors import ConfigError, DataError


def make_tasks(root: Path, *names: str, toml: str = "") -> Path:
    for name in names:
        make_task(root / name, toml, **{"instruction.md": f"Do {name}.\n"})
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Harbor's cache, as its downloads leave it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tasks = tmp_path / ".cache/harbor/tasks"
    make_tasks(tasks, "8fKq2LmZxY4/fix-git", "9aaaaaaaaaaa/sort-mail", "packages/some-org/sort-mail/0123456789abcdef")
    make_tasks(tasks, "packages/some-org/plan/ffffffffffffffff", "by-hand-2.0/bench/one", "by-hand-2.0/bench/two")
    return tasks


def test_a_folder_of_tasks_has_their_paths_as_ids(tmp_path: Path):
    make_tasks(tmp_path / "bench", "b", "a", "group/c", ".hidden/d")
    (tmp_path / "bench" / "README.md").write_text("")
    data = load_harbor_dataset(str(tmp_path / "bench"))
    assert (data.name, data.train, data.test) == ("bench", ("a", "b", "group/c"), ())
    assert data.tasks["group/c"].instruction == "Do group/c.\n"


def test_one_task_is_a_dataset(tmp_path: Path):
    make_tasks(tmp_path, "only")
    assert load_harbor_dataset(str(tmp_path / "only")).train == ("only",)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("some-org", ("some-org/plan@ffffffff", "some-org/sort-mail@01234567")),
        ("some-org/plan", ("some-org/plan@ffffffff",)),
        ("fix-git", ("fix-git@8fKq2LmZ",)),
        ("by-hand@2.0", ("by-hand-2.0/bench/one", "by-hand-2.0/bench/two")),
        ("by-hand-2.0/bench", ("by-hand-2.0/bench/one", "by-hand-2.0/bench/two")),
        ("~/.cache/harbor/tasks/by-hand-2.0", ("bench/one", "bench/two")),
    ],
)
def test_a_name_is_found_in_harbors_cache(cache: Path, name: str, ids: tuple[str, ...]):
    assert load_harbor_dataset(name).train == ids


def test_the_whole_cache_keeps_two_versions_of_a_task_apart(cache: Path):
    ids = load_harbor_dataset(str(cache)).train
    assert {"sort-mail@9aaaaaaa", "some-org/sort-mail@01234567", "fix-git@8fKq2LmZ"} < set(ids) and len(ids) == 6


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("some-bench@2.0", "uvx harbor datasets download some-bench@2.0 -o FOLDER"),
        ("some-orh", "did you mean 'some-org'?"),
        ("../tasks/fix-git", "holds 6 tasks"),
    ],
)
def test_an_unknown_name_says_how_to_get_it(cache: Path, name: str, part: str):
    with pytest.raises(DataError) as error:
        load_harbor_dataset(name)
    assert part in str(error.value)


def test_a_folder_without_tasks_is_said_to_be_one(tmp_path: Path):
    with pytest.raises(DataError, match=r"no task\.toml in this folder or below it"):
        load_harbor_dataset(str(tmp_path))


def test_the_split_is_seeded_and_has_no_overlap(tmp_path: Path):
    make_tasks(tmp_path, *(f"t{i}" for i in range(12)))
    splits = [load_harbor_dataset(str(tmp_path), eval_size=4, seed=seed) for seed in (0, 0, 1)]
    for split in splits:
        assert len(split.test) == 4 and not set(split.test) & set(split.train)
        assert set(split.test) | set(split.train) == set(split.tasks)
    assert splits[0].test == splits[1].test != splits[2].test


def test_equal_instructions_are_on_one_side(tmp_path: Path):
    for i in range(10):
        make_task(tmp_path / f"t{i}", **{"instruction.md": f"Do it {i // 2}."})
    data = load_harbor_dataset(str(tmp_path), eval_size=4)
    texts = [{data.tasks[i].instruction for i in ids} for ids in (data.train, data.test)]
    assert len(data.test) == 4 and not texts[0] & texts[1]


def test_rows_are_drawn_in_a_seeded_order(tmp_path: Path):
    make_tasks(tmp_path, *(f"t{i}" for i in range(8)))
    data = load_harbor_dataset(str(tmp_path))
    drawn = [[r.row_id for r in Cursor(data.rows(data.train), seed=seed).next(8)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(drawn[0]) == sorted(data.train)


def test_chosen_tasks_and_a_number_of_them(tmp_path: Path):
    make_tasks(tmp_path, "a/x", "b", "c")
    assert load_harbor_dataset(str(tmp_path), task_names=("x", "c")).train == ("a/x", "c")
    assert load_harbor_dataset(str(tmp_path), max_tasks=2).train == ("a/x", "b")
    with pytest.raises(DataError, match=r"has no task 'bb'; did you mean 'b'\?"):
        load_harbor_dataset(str(tmp_path), task_names=("bb",))


def test_what_is_not_honoured_is_said_once_with_the_tasks(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_tasks(tmp_path, "a", "b", toml="[environment]\nstorage_mb = 5\n")
    make_tasks(tmp_path, "c", toml="[environment]\ngpus = 1\n")
    with caplog.at_level(logging.WARNING):
        load_harbor_dataset(str(tmp_path))
    disk, gpu = (record.getMessage() for record in caplog.records)
    assert "environment.storage_mb" in disk and disk.endswith("in 2 of 3 tasks: a, b")
    assert "environment.gpus" in gpu and gpu.endswith("in 1 of 3 tasks: c")


def test_tasks_that_cannot_run_are_refused_all_by_name_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_tasks(tmp_path, "a", "b", "c")
    for name in ("a", "c"):
        (tmp_path / name / "environment/docker-compose.yaml").write_text("services: {}")
    with pytest.raises(DataError) as error:
        load_harbor_dataset(str(tmp_path))
    assert str(tmp_path / "a") in str(error.value) and str(tmp_path / "c") in str(error.value)
    assert "2 of 3 tasks cannot run here; unsupported_tasks=skip" in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert load_harbor_dataset(str(tmp_path), unsupported="skip").train == ("b",)
    assert len(caplog.records) == 2


def test_a_broken_task_is_never_skipped(tmp_path: Path):
    make_tasks(tmp_path, "a", "b")
    (tmp_path / "b" / "task.toml").write_text("[agent]\ntimeout_sec = -1")
    with pytest.raises(DataError, match=r"b/task\.toml: agent\.timeout_sec"):
        load_harbor_dataset(str(tmp_path), unsupported="skip")


def test_variables_of_the_host_must_be_let_in(tmp_path: Path):
    make_tasks(tmp_path, "a", toml="[environment]\nenv = {K = '${API_KEY}'}\n")
    with pytest.raises(ConfigError, match="pass_env=API_KEY"):
        load_harbor_dataset(str(tmp_path))
    load_harbor_dataset(str(tmp_path), pass_env={"API_KEY": "x"})


def test_the_tasks_that_ship_are_read_without_a_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        data = load_harbor_dataset(STARTER, eval_size=2)
    assert len(data.tasks) == 8 and not caplog.records
    for task in data.tasks.values():
        assert not task.network and all(step.solution for step in task.steps)
