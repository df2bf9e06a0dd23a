"""Grades, the process behind math-verify, and accuracy with its error."""

import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from envs import grading
from envs.grading import MathWorker, accuracy_with_error, grade, last_boxed

# --- mathematics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{72}", "72"),
        ("72.", "72"),
        ("It costs $72.", "72"),
        ("She paid 5 and then 7. #### 12", "12"),
        ("The answer is 1,234.", "1,234"),
        ("\\boxed{1234}", "1,234"),
        ("\\boxed{1{,}234}", "1234"),
        ("\\boxed{3.50}", "3.5"),
        ("\\boxed{-7}", "-7"),
        ("so $\\boxed{\\frac12}$", "\\frac{1}{2}"),
        ("\\boxed{0.75}", "$\\dfrac{3}{4}$"),
        ("\\boxed{0.333333}", "1/3"),
        ("Therefore the value is $\\frac{3}{4}$.", "\\boxed{\\dfrac{3}{4}}"),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}"),
        ("\\boxed{1+x^2}", "x^2 + 1"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{(-\\infty, 3)}", "(-\\infty,3)"),
        ("\\boxed{\\text{yes}}", "Yes"),
        ("The answer is yes.", "Yes"),
        ("\\boxed{1} is wrong, it is \\boxed{2}", "2"),
        ("\\boxed{72} as asked: the answer is in \\boxed{} format", "72"),
        ("\\boxed{72}" + " and so on" * 5000, "72"),
        ("thinking " * 5000 + "\nAnswer: 72", "72"),
    ],
)
def test_right_mathematics(text, expected):
    assert grade("math", text, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{73}", "72"),
        ("\\boxed{72} no, \\boxed{73}", "72"),
        ("I was given 72 and found 73", "72"),
        ("\\boxed{\\frac{1}{3}}", "\\frac{1}{2}"),
        ("\\boxed{(2,1)}", "(1,2)"),
        ("\\boxed{No}", "Yes"),
        ("\\boxed{x^2}", "x^2+1"),
        ("no idea", "72"),
        ("", "72"),
        ("\\boxed{}", "0"),
        ("\\boxed{72", "73"),
        ("\\boxed{1/0}", "0"),
        ("72", ""),
    ],
)
def test_wrong_mathematics(text, expected):
    assert not grade("math", text, expected)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "\\boxed{{}" * 20_000,
        "{" * 100_000 + "}" * 100_000,
        "$ " * 50_000,
        "1 " * 50_000,
        "\\boxed{" + "(" * 1500 + ")" * 1500,
        "\x00\ud800 \\frac{{{",
        "answer is " * 20_000,
    ],
    ids=["open", "empty", "braces", "dollars", "ones", "deep", "surrogate", "markers"],
)
def test_degenerate_texts_are_wrong_and_cheap(text):
    start = time.monotonic()
    assert not grade("math", text, "x+72")
    assert time.monotonic() - start < 15


@pytest.fixture(scope="module")
def worker():
    worker = MathWorker(cpu_limit_s=1)
    yield worker
    worker.close()


@pytest.mark.parametrize("tower", ["\\boxed{9^{9^{9^9}}}", pytest.param("9**9**9**9", marks=pytest.mark.slow)])
def test_a_tower_of_powers_is_stopped_and_the_next_answer_is_graded(worker, tower, caplog):
    def ask():
        assert not worker.equal(tower, "\\boxed{72}")
        assert worker.equal("x is 72", "\\boxed{72}")

    with ThreadPoolExecutor(1) as pool:  # not the main thread: signal.alarm would raise here
        asked = pool.submit(ask)
        longest, start = 0.0, time.monotonic()
        last = start
        while not asked.done():
            time.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        asked.result()
    assert last - start < 60
    assert longest < (last - start) / 2, "an in-process power holds the interpreter's lock throughout"
    assert caplog.text.count("took more than 1 s of CPU") == 1


def test_many_threads_may_grade_at_once():
    cases = [(f"\\boxed{{{i}x+x}}", f"{i + i % 2 + 1}x", i % 2 == 0) for i in range(1, 25)]
    with ThreadPoolExecutor(8) as pool:
        grades = list(pool.map(lambda case: grade("math", case[0], case[1]), cases))
    assert grades == [right for _, _, right in cases]


def test_a_killed_worker_is_replaced(worker):
    assert worker.equal("\\boxed{x+x}", "\\boxed{2x}")
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert worker.equal("\\boxed{x+x}", "\\boxed{2x}")


def test_a_frozen_worker_is_ended_and_replaced(worker, monkeypatch, caplog):
    assert worker.equal("\\boxed{x+x}", "\\boxed{2x}")
    os.kill(worker._process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
        patched.setattr(grading, "WALL_LIMIT_S", 0.5)
        asked = pool.submit(worker.equal, "\\boxed{x+x}", "\\boxed{2x}")
        try:
            assert asked.result(20) is False and "status -9" in caplog.text
        finally:
            worker._process and os.kill(worker._process.pid, signal.SIGCONT)
    assert worker.equal("\\boxed{x+x}", "\\boxed{2x}")


def test_a_forked_child_uses_a_worker_of_its_own(worker):
    assert worker.equal("\\boxed{x+x}", "\\boxed{2x}")
    child = os.fork()
    if child == 0:
        os._exit(0 if worker.equal("\\boxed{3x}", "\\boxed{x+2x}") else 1)
    assert worker.equal("\\boxed{x+x}", "\\boxed{2x}")
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed {a} \\fbox{b}", "a"),
        ("} \\boxed{a} {", "a"),
        ("\\boxed{x=\\boxed{5}}", "5"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("boxed{1}", None),
    ],
)
def test_the_last_closed_box(text, content):
    found = last_boxed(text)
    assert (found[0] if found else None) == content


# --- exact and arithmetic -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Paris", True),
        ("  paris.\n", True),
        ("I think the answer is Paris.", True),
        ("The answer is: **Paris**\nIt lies on the Seine.", True),
        ("Answer: Paris", True),
        ("#### Paris", True),
        ("so \\boxed{Paris} it is", True),
        ("The answer is \\boxed{Paris}.", True),
        ("The answer is Rome. No, the answer is Paris", True),
        ("The answer is Paris. No, the answer is Rome", False),
        ("\\boxed{Paris}, or rather: the answer is Rome", False),
        ("Paris is nice", False),
        ("I love Paris", False),
        ("", False),
    ],
)
def test_exact(text, right):
    assert grade("exact", text, "Paris") is right


def test_arithmetic():
    assert grade("arithmetic", "7+8=15,4+3+1=08;85", "85")
    assert not grade("arithmetic", "7+8=15,4+3+1=08;84", "85")
    assert not grade("arithmetic", "85", "85")


def test_an_unknown_grader_is_an_error():
    with pytest.raises(ValueError, match="'maths'"):
        grade("maths", "1", "1")  # type: ignore[arg-type]


# --- accuracy -------------------------------------------------------------------------------------


def test_the_error_of_independent_answers_is_the_binomial_one():
    mean, error = accuracy_with_error([True] * 30 + [False] * 70)
    assert mean == 0.3
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_equal_samples_of_a_row_count_once():
    correct = [True, False, True, True]
    rows = [f"r{i}" for i in range(4) for _ in range(8)]
    repeated = [c for c in correct for _ in range(8)]
    assert accuracy_with_error(repeated, rows) == pytest.approx(accuracy_with_error(correct))


def test_the_clustered_error_is_the_spread_over_repeated_experiments():
    rng = np.random.default_rng(0)
    rows = [f"r{i}" for i in range(40) for _ in range(4)]
    runs = []
    for _ in range(400):
        skill = np.repeat(rng.beta(0.5, 0.5, size=40), 4)
        runs.append(accuracy_with_error((rng.random(160) < skill).tolist(), rows))
    means, errors = np.array(runs).T
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_the_error_of_one_row_is_unknown_and_not_zero():
    mean, error = accuracy_with_error([True, False], ["a", "a"])
    assert mean == 0.5 and math.isnan(error)


def test_accuracy_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no answers"):
        accuracy_with_error([])
