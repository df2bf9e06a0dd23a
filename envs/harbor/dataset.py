"""Sets of Harbor tasks: a folder of them, a name under Harbor's cache, or the few that ship with Protege.

Harbor's cache keeps a task of a git repository as `HASH/NAME` and one of its hub as
`packages/ORG/NAME/DIGEST`. It does not say which dataset a task of the first kind came from.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from envs.datasets import Row, split_held_out
from envs.harbor.task import HarborTask, UnsupportedTaskError, check_variables, load_task
from errors import DataError

logger = logging.getLogger(__name__)

STARTER = "starter"
STARTER_FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class HarborDataset:
    """Tasks by id, and the ids of each split. No instruction is in both."""

    name: str
    tasks: Mapping[str, HarborTask]
    train: tuple[str, ...]
    test: tuple[str, ...]

    def rows(self, ids: Sequence[str]) -> list[Row]:
        """What the loop's cursor draws from: it shuffles them by seed, and a resumed run finds its place."""
        return [row_of(self.tasks[task_id]) for task_id in ids]


def row_of(task: HarborTask) -> Row:
    return Row(row_id=task.task_id, messages=({"role": "user", "content": task.instruction},))


def cache_folder() -> Path:
    """Where Harbor keeps the tasks that it downloads."""
    return Path("~/.cache/harbor/tasks").expanduser()


def load_harbor_dataset(
    dataset: str,
    *,
    eval_size: int = 0,
    seed: int = 0,
    max_tasks: int | None = None,
    task_names: Sequence[str] = (),
    unsupported: Literal["error", "skip"] = "error",
    pass_env: Mapping[str, str] | None = None,
) -> HarborDataset:
    """The tasks of a folder or a name, `eval_size` of them held out by `seed`.

    `task_names` keeps those alone, by id or folder name. Everything that a task asks for and does not
    get is logged as a warning, by field, with the tasks that ask for it.

    Raises:
        DataError: no such dataset, a broken task, or an unsupported one unless `unsupported="skip"`.
        ConfigError: a task needs a variable of the host that `pass_env` does not hold.
    """
    name, folders = _find(dataset)
    folders = _chosen(folders, task_names, dataset)
    tasks = _load(folders, unsupported)
    if max_tasks is not None:
        tasks = dict(list(tasks.items())[:max_tasks])
    for task in tasks.values():
        check_variables(task, pass_env or {})
    _warn(name, list(tasks.values()))
    rows = [row_of(task) for task in tasks.values()]
    train, test = split_held_out(rows, eval_size, seed) if eval_size else (rows, [])
    return HarborDataset(name, tasks, tuple(r.row_id for r in train), tuple(r.row_id for r in test))


# --- where the tasks are


def _find(dataset: str) -> tuple[str, dict[str, Path]]:
    """The dataset's name, and its task folders by id. Raises `DataError`."""
    if dataset == STARTER:
        return STARTER, task_folders(STARTER_FOLDER)
    path, cache = Path(dataset).expanduser(), cache_folder()
    if path.is_dir():
        found = _cached(path) if path.resolve() == cache.resolve() else task_folders(path)
        if not found:
            raise DataError(f"dataset={dataset}: no task.toml in this folder or below it")
        return path.resolve().name, found
    cached = _cached(cache) if cache.is_dir() else {}
    for folder in (cache / dataset, cache / dataset.replace("@", "-"), cache / "packages" / dataset.partition("@")[0]):
        if _inside(folder, cache) and (found := {i: p for i, p in cached.items() if p.is_relative_to(folder)}):
            return dataset, found
    if found := {i: p for i, p in cached.items() if i.partition("@")[0] == dataset}:
        return dataset, found
    names = {i.partition("@")[0] for i in cached} | {i.partition("/")[0] for i in cached if "/" in i} | {STARTER}
    near = difflib.get_close_matches(dataset, names, n=1)
    raise DataError(
        f"dataset={dataset}: neither a folder nor a name under {cache}, which holds {len(cached)} tasks"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + f". Get it with `uvx harbor datasets download {dataset} -o FOLDER` and give dataset=FOLDER; "
        f"dataset={cache} takes everything that Harbor has downloaded"
    )


def _inside(folder: Path, cache: Path) -> bool:
    return folder.is_dir() and folder.resolve().is_relative_to(cache.resolve()) and folder.resolve() != cache.resolve()


def task_folders(root: Path) -> dict[str, Path]:
    """Every task at or below `root`: its path from there as its id, in order of ids."""
    if (root / "task.toml").is_file():
        return {root.resolve().name: root}
    return {path.relative_to(root).as_posix(): path for path in sorted(_walk(root))}


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or not path.is_dir():
            continue
        if (path / "task.toml").is_file():
            yield path
        else:
            yield from _walk(path)


def _cached(cache: Path) -> dict[str, Path]:
    """Ids of the cache's tasks: `NAME@HASH` and `ORG/NAME@DIGEST`, shortened, whatever else is downloaded."""
    found = {}
    for path in task_folders(cache).values():
        parts = path.relative_to(cache).parts
        if parts[0] == "packages" and len(parts) == 4:
            task_id = f"{parts[1]}/{parts[2]}@{parts[3][:8]}"
        elif len(parts) == 2:
            task_id = f"{parts[1]}@{parts[0][:8]}"
        else:  # put there by hand, as with `download -o`
            task_id = "/".join(parts)
        found[task_id] = path
    return dict(sorted(found.items()))


def _chosen(folders: dict[str, Path], names: Sequence[str], dataset: str) -> dict[str, Path]:
    if not names:
        return folders
    chosen = {i: p for i, p in folders.items() if i in names or i.partition("@")[0] in names or p.name in names}
    for name in names:
        if not any(name in (i, i.partition("@")[0], p.name) for i, p in folders.items()):
            near = difflib.get_close_matches(name, folders, n=1)
            raise DataError(
                f"dataset={dataset} has no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return chosen


# --- reading them


def _load(folders: Mapping[str, Path], unsupported: str) -> dict[str, HarborTask]:
    tasks, refused = {}, []
    for task_id, folder in folders.items():
        try:
            tasks[task_id] = load_task(folder, task_id)
        except UnsupportedTaskError as error:
            refused.append(str(error))
    if refused and (unsupported == "error" or not tasks):
        raise DataError(
            "\n".join(refused)
            + f"\n{len(refused)} of {len(folders)} tasks cannot run here"
            + ("; unsupported_tasks=skip goes on without them" if tasks else "")
        )
    for reason in refused:
        logger.warning("left out: %s", reason)
    return tasks


def _warn(name: str, tasks: Sequence[HarborTask]) -> None:
    """One line per thing that is not honoured, with the tasks that ask for it."""
    by_note: dict[str, list[str]] = {}

    for task in tasks:
        for note in task.notes:
            by_note.setdefault(note, []).append(task.task_id)
    for note, ids in by_note.items():
        logger.warning("%s: not honoured: %s, in %d of %d tasks: %s", name, note, len(ids), len(tasks), ", ".join(ids))
