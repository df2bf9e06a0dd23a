"""Where rows come from: the named datasets, local copies of them, and any JSONL file.

To add a dataset: write one function that turns a record of it into a row of the JSONL contract, and
add one entry to `SOURCES`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs import arithmetic
from envs.datasets import Dataset, GraderName, Record, Row, parse_row, prompt_key, read_jsonl, split_held_out
from envs.grading import plain_number
from errors import DataError

logger = logging.getLogger(__name__)

BOXED_INSTRUCTION = "\nWrite your answer in \\boxed{} format."

# --- one function per dataset: upstream record -> JSONL contract, or None if it has no prompt -------


def _question_row(question: str, answer: str) -> Record:
    messages = [{"role": "user", "content": question.strip() + BOXED_INSTRUCTION}]
    return {"messages": messages, "expected_answer": answer.strip()}


def _gsm8k_row(record: Record) -> Record:
    _, mark, final = record["answer"].rpartition("####")
    if not mark:
        raise ValueError("answer has no '####'")
    return _question_row(record["question"], final.replace(",", ""))


def _deepmath_row(record: Record) -> Record:
    return _question_row(record["question"], record["final_answer"])


def _tulu3_row(record: Record) -> Record | None:
    """The conversation up to the last user message; the assistant's last reply, if any, completes it."""
    messages = record["messages"]
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last_user is None:
        return None
    replies = [m["content"] for m in messages[last_user + 1 :] if m["role"] == "assistant" and m["content"]]
    return {"messages": messages[: last_user + 1], "completion": replies[-1] if replies else None}


_ROLE_OF = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def _openthoughts3_row(record: Record) -> Record | None:
    """A conversation whose last turn is the answer: a long chain of thought and a solution."""
    turns = record["conversations"]
    if not turns or _ROLE_OF.get(turns[-1]["from"]) != "assistant" or not turns[-1]["value"]:
        return None
    messages = [{"role": _ROLE_OF.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns[:-1]]
    return {"messages": messages, "completion": turns[-1]["value"]} if messages else None


@dataclass(frozen=True)
class Source:
    """A dataset on the Hugging Face hub, and how to read its records."""

    hub_id: str
    columns: tuple[str, ...]  # those that `to_row` reads; the others are never decoded
    to_row: Callable[[Record], Record | None]
    grader: GraderName
    config: str | None = None
    test_split: str | None = None  # None: evaluation rows are held out of train


SOURCES: dict[str, Source] = {
    "deepmath": Source("zwhe99/DeepMath-103K", ("question", "final_answer"), _deepmath_row, "math"),
    "tulu3": Source("allenai/tulu-3-sft-mixture", ("messages",), _tulu3_row, "exact"),
    "openthoughts3": Source("open-thoughts/OpenThoughts3-1.2M", ("conversations",), _openthoughts3_row, "exact"),
    "gsm8k": Source("openai/gsm8k", ("question", "answer"), _gsm8k_row, "math", "main", "test"),
}
NAMES = ("arithmetic", *SOURCES)

# --- routes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """How a row says which teacher judges it: `key` holds one of `known`. `required`: no row may leave it out."""

    key: str
    known: Sequence[str]
    required: bool

    def apply(self, record: Record, route: Any) -> Record:
        """The record with `route` as its `teacher`. Raises ValueError for one that is not known, or is missing."""
        rest = {key: value for key, value in record.items() if key not in (self.key, "teacher")}
        if route is None:
            if self.required:
                raise ValueError(f"has no {self.key!r}, which says who teaches it: {self._known}")
            return rest
        if route not in self.known:
            near = difflib.get_close_matches(str(route), self.known, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"{self.key} is {route!r}, which no teacher answers to{guess} {self._known}")
        return {**rest, "teacher": route}

    @property
    def _known(self) -> str:
        return f"expected one of {', '.join(map(repr, self.known))}"


# --- loading --------------------------------------------------------------------------------------


def load_dataset_rows(
    dataset: str,
    dataset_path: str | None = None,
    *,
    eval_size: int,
    seed: int,
    max_rows: int | None = None,
    routing: Routing | None = None,
) -> Dataset:
    """The rows of a named dataset, of a local copy of it, or of a JSONL file.

    At most `eval_size` rows are in `test`: of the source's own test split where it has one, else held
    out of train. At most `max_rows` are in `train`. Both are seeded samples, not the first rows
    (mixtures are sorted by origin), and a prompt that is in `test` is taken out of `train`.

    `dataset_path` points a named dataset at a JSONL or parquet file, a folder with train.jsonl and
    test.jsonl or with parquet files, or a `save_to_disk` folder. Its records may be as upstream or in
    the JSONL contract. A path is graded as mathematics if all its expected answers are numbers. With
    `routing`, every row that names a teacher names one that it knows.

    Raises:
        DataError: unknown name, nothing at the path, a hub that cannot be reached, a broken row.
    """
    if eval_size < 0 or (max_rows is not None and max_rows < 1):
        raise DataError(f"eval_size={eval_size} max_rows={max_rows}: expected at least 0 and at least 1")
    if dataset == "arithmetic" and dataset_path is None:
        if routing is not None and routing.required:
            raise DataError("arithmetic: its rows say no teacher; give the dataset one")
        # The split never follows the run's seed: the embedded models were trained on the default one's rows.
        train, test = arithmetic.rows("train"), _sample(arithmetic.rows("test"), eval_size, seed)
        return Dataset(dataset, _sample(train, max_rows, seed), test, "arithmetic")

    name, source, path = locate(dataset, dataset_path)
    splits = _open_local(path, source) if path else _open_hub(name, SOURCES[name])
    reader = _Reader(name, source, seed, routing)
    if "test" in splits:
        test = reader.read(splits["test"], "test", eval_size)
        train = _without_prompts_of(test, reader.read(splits["train"], "train", max_rows), name)
    else:
        wanted = None if max_rows is None else max_rows + eval_size
        train, test = split_held_out(reader.read(splits["train"], "train", wanted), eval_size, seed)
    grader = "arithmetic" if name == "arithmetic" else source.grader if source else _grader_for(train + test)
    return Dataset(name, train[:max_rows], test, grader)


def load_eval_rows(dataset: str, dataset_path: str | None = None, *, eval_size: int, seed: int) -> Dataset:
    """At most `eval_size` rows to evaluate on, in `test`: of a file without a test split, any of its rows.

    Raises DataError, as `load_dataset_rows`.
    """
    if dataset in NAMES:
        return load_dataset_rows(dataset, dataset_path, eval_size=eval_size, seed=seed)
    whole = load_dataset_rows(dataset, dataset_path, eval_size=0, seed=seed)
    rows = whole.test or whole.train
    return Dataset(whole.name, [], _sample(rows, eval_size, seed), whole.grader)


def locate(dataset: str, dataset_path: str | None) -> tuple[str, Source | None, Path | None]:
    """(name, its source if it has one, where it lies locally if it does). Raises DataError."""
    if dataset in NAMES:
        path = Path(dataset_path).expanduser() if dataset_path else None
        if path and not path.exists():
            raise DataError(f"dataset_path={dataset_path}: no such file or folder")
        return dataset, SOURCES.get(dataset), path
    path = Path(dataset).expanduser()
    if path.exists() and dataset:
        if dataset_path:
            raise DataError(f"dataset={dataset} is a path already; leave out dataset_path={dataset_path}")
        return path.stem, None, path
    if path.suffix in JSONL_SUFFIXES or "/" in dataset:
        raise DataError(f"dataset={dataset}: no such file")
    near = difflib.get_close_matches(dataset, NAMES, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    raise DataError(
        f"dataset={dataset!r} is not known{guess} Expected one of {', '.join(NAMES)}, or the path of a JSONL file"
    )


# A split is a JSONL file, or an Arrow table (`datasets.Dataset`: len(), select()).
JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
Split = Path | Any


def _open_local(path: Path, source: Source | None) -> dict[str, Split]:
    """The splits ("train", maybe "test") that a file or folder holds."""
    if path.is_file():
        if path.suffix in JSONL_SUFFIXES:
            return {"train": path}
        if path.suffix == ".parquet":
            return {"train": _parquet([path])}
        raise DataError(f"{path}: expected a .jsonl or .parquet file, or a folder")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _saved_to_disk(path)
    if source and source.config and (path / source.config).is_dir():
        path = path / source.config  # a snapshot of the hub's repository: one folder per config
    jsonl = {split: path / f"{split}.jsonl" for split in ("train", "test")}
    if jsonl["train"].exists():
        return {split: file for split, file in jsonl.items() if file.exists()}
    parquet = {split: sorted(path.rglob(f"{split}*.parquet")) for split in ("train", "test")}
    if parquet["train"]:
        return {split: _parquet(files) for split, files in parquet.items() if files}
    raise DataError(f"{path}: expected train.jsonl (and test.jsonl), train*.parquet files, or a save_to_disk folder")


def _parquet(files: Sequence[Path]) -> Split:
    import datasets  # seconds to import; most runs never need it

    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # pyarrow's, datasets' and the file system's: all mean a bad file
        raise DataError(f"{files[0]}: cannot be read as parquet: {error}") from error


def _saved_to_disk(path: Path) -> dict[str, Split]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: cannot be read as a save_to_disk folder: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    if "train" not in loaded:
        raise DataError(f"{path}: has no 'train' split, only {', '.join(map(str, loaded))}")
    return {split: loaded[split] for split in ("train", "test") if split in loaded}


def _open_hub(name: str, source: Source) -> dict[str, Split]:
    import datasets

    splits = {"train": "train"} | ({"test": source.test_split} if source.test_split else {})
    try:
        return {
            ours: datasets.load_dataset(source.hub_id, source.config, split=theirs) for ours, theirs in splits.items()
        }
    except Exception as error:  # network, hub, cache or disk: the way out is the same
        raise DataError(
            f"dataset={name}: {source.hub_id} could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Without a network, point dataset_path= at a local copy: "
            "a JSONL or parquet file, or a folder of them"
        ) from error


# --- reading --------------------------------------------------------------------------------------

_CONTRACT_ONLY = ("teacher_messages", "teacher_hints", "teacher", "expected_answer", "completion")


@dataclass(frozen=True)
class _Reader:
    """Turns the records of a split into rows."""

    name: str
    source: Source | None
    seed: int
    routing: Routing | None

    def read(self, split: Split, split_name: str, n: int | None) -> list[Row]:
        """A seeded sample of n rows, in the order of the split; None: all of them."""
        if isinstance(split, Path):  # every row is checked, so that a broken one is always refused
            return _sample(read_jsonl(split, self.to_contract), n, self.seed)
        table: Any = split
        if self.source and set(self.source.columns) <= set(table.column_names):
            route = {self.routing.key} if self.routing else set()
            keep = {*self.source.columns, *_CONTRACT_ONLY, "id", *route} & set(table.column_names)
            table = table.select_columns(sorted(keep))
        chosen = _sample(range(len(table)), n, self.seed)
        rows = []
        for i, record in zip(chosen, table.select(chosen), strict=True):
            where = f"{self.name}/{split_name}:{i}"
            try:
                contract = self.to_contract(record)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from None
            if contract is not None:
                rows.append(parse_row(contract, where))
        if len(rows) < len(chosen):
            logger.warning("%s: left out %d records without a prompt", self.name, len(chosen) - len(rows))
        if chosen and not rows:
            raise DataError(f"{self.name}/{split_name}: no record has a prompt")
        return rows

    def to_contract(self, record: Record) -> Record | None:
        """Raises ValueError with the reason if the record is neither upstream's nor the contract's, or goes nowhere."""
        contract = self._contract(record)
        if contract is None or self.routing is None:
            return contract
        return self.routing.apply(contract, record.get(self.routing.key))

    def _contract(self, record: Record) -> Record | None:
        if self.source is None:
            return record
        upstream = all(column in record for column in self.source.columns)
        if "messages" in record and (not upstream or any(record.get(k) is not None for k in _CONTRACT_ONLY)):
            return record
        if not upstream:
            raise ValueError(
                f"expected {self.name}'s fields {', '.join(self.source.columns)}, or the JSONL contract's "
                f"messages; found {', '.join(sorted(record)) or 'none'}"
            )
        try:
            return self.source.to_row(record)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a {self.name} record: {type(error).__name__}: {error}") from error


def _sample(items: Sequence[Any], n: int | None, seed: int) -> list[Any]:
    """n of the items, drawn without replacement and kept in their order."""
    if n is None or n >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), size=n, replace=False)
    return [items[i] for i in sorted(chosen.tolist())]


def _without_prompts_of(test: Sequence[Row], train: list[Row], name: str) -> list[Row]:
    held_out = {prompt_key(row) for row in test}
    kept = [row for row in train if prompt_key(row) not in held_out]
    if len(kept) < len(train):
        logger.warning("%s: took %d train rows out: test has their prompts", name, len(train) - len(kept))
    if not kept:
        raise DataError(f"{name}: every train prompt is also in test; set eval_size=0 or change the split")
    return kept


def _grader_for(rows: Sequence[Row]) -> GraderName:
    answers = [row.expected_answer for row in rows if row.expected_answer is not None]
    numbers = bool(answers) and all(plain_number(answer) is not None for answer in answers)
    return "math" if numbers else "exact"
