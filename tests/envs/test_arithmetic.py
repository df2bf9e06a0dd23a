"""The procedural task: every problem once, correct, and split without leaks."""

import re

import pytest

from envs.arithmetic import ALPHABET, MAX_COMPLETION_CHARS, answer, completion, rows
from envs.sources import load_dataset_rows


def operands(row):
    match = re.fullmatch(r"(\d\d)\+(\d\d)=", row.messages[0]["content"])
    assert match
    return int(match[1]), int(match[2])


def worked(row):
    assert row.completion is not None
    return row.completion


def test_both_splits_together_are_all_problems_once():
    pairs = [operands(r) for split in ("train", "test") for r in rows(split, seed=1, test_size=500)]
    assert sorted(pairs) == [(a, b) for a in range(100) for b in range(100)]


@pytest.mark.parametrize("test_size", [1, 2, 499, 500])
def test_the_test_split_has_its_size_and_no_commuted_twin_in_train(test_size):
    train = {frozenset(operands(r)) for r in rows("train", 0, test_size)}
    test = rows("test", 0, test_size)
    assert len(test) == test_size
    assert not train & {frozenset(operands(r)) for r in test}


def test_the_split_depends_on_the_seed_alone():
    assert rows("test", 3, 50) == rows("test", 3, 50)
    assert rows("test", 3, 50) != rows("test", 4, 50)


def test_every_completion_is_true_and_gives_the_expected_answer():
    for row in rows("train", 0, 0):
        a, b = operands(row)
        assert row.expected_answer == str(a + b) == answer(worked(row))
        *steps, _ = re.split("[,;]", worked(row))
        for step in steps:  # "4+3+1=08"
            terms, total = step.split("=")
            assert sum(map(int, terms.split("+"))) == int(total)


def test_the_written_form():
    assert completion(47, 38) == "7+8=15,4+3+1=08;85"
    assert completion(0, 0) == "0+0=00,0+0+0=00;0"


def test_the_alphabet_is_exactly_what_is_used():
    texts = [r.messages[0]["content"] + worked(r) for r in rows("train", 0, 0)]
    assert set("".join(texts)) == set(ALPHABET)
    assert len(set(ALPHABET)) == len(ALPHABET)
    assert max(len(worked(r)) for r in rows("train", 0, 0)) == MAX_COMPLETION_CHARS <= 24


@pytest.mark.parametrize(
    ("text", "found"),
    [("7+8=15,4+3+1=08;85", "85"), ("1;2;3 ", "3"), ("85", None), ("7+8;", None), (";8+5", None), ("", None)],
)
def test_the_answer_is_what_follows_the_last_separator(text, found):
    assert answer(text) == found


def test_the_named_dataset():
    data = load_dataset_rows("arithmetic", eval_size=100, seed=0, max_rows=1000)
    assert (data.name, data.grader, len(data.train), len(data.test)) == ("arithmetic", "arithmetic", 1000, 100)
