"""Metrics add up: sums over weights, whatever the split."""

import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.metrics import StageTimer, SumMetrics


def test_a_ratio_is_the_mean_over_items_and_not_the_mean_of_means():
    metrics = SumMetrics()
    metrics.add("kl", value_sum=10.0, weight=1)  # mean 10
    metrics.add("kl", value_sum=9.0, weight=9)  # mean 1
    assert metrics.as_dict() == {"kl": 1.9}


def test_scopes_hold_their_own_items_and_the_plain_name_holds_all():
    metrics = SumMetrics()
    metrics.add("kl", 2.0, 1, dataset="gsm8k", teacher="big")
    metrics.add("kl", 4.0, 3, dataset="tulu3", teacher="big")
    metrics.add_count("dropped", dataset="tulu3")
    metrics.add_max("ratio/max", 3.0, teacher="big")
    assert metrics.as_dict() == {
        "kl": 1.5,
        "dataset/gsm8k/kl": 2.0,
        "dataset/tulu3/kl": 4 / 3,
        "teacher/big/kl": 1.5,
        "ratio/max": 3.0,
        "teacher/big/ratio/max": 3.0,
        "dropped": 1,
        "dataset/tulu3/dropped": 1,
    }


def test_a_ratio_over_nothing_has_no_value():
    metrics = SumMetrics()
    metrics.add("kl", 0.0, 0)
    assert metrics.as_dict() == {}


def test_one_name_is_one_kind():
    metrics = SumMetrics()
    metrics.add("x", 1.0)
    with pytest.raises(ValueError, match="x is already"):
        metrics.add_max("x", 1.0)
    with pytest.raises(ValueError, match="-1"):
        metrics.add("y", 1.0, weight=-1)


def test_a_nan_shows_in_a_maximum_whatever_the_order():
    for values in ([1.0, math.nan, 2.0], [math.nan, 1.0], [1.0, math.nan]):
        metrics = SumMetrics()
        for value in values:
            metrics.add_max("m", value)
        assert math.isnan(metrics.as_dict()["m"])


events = st.lists(
    st.tuples(
        st.sampled_from(["add", "max", "count"]),
        st.floats(-1e3, 1e3),
        st.integers(0, 50),
        st.sampled_from([None, "a", "b"]),
        st.sampled_from([None, "t"]),
        st.integers(0, 3),
    ),
    max_size=40,
)


@given(events)
def test_merging_parts_is_the_same_as_accumulating_everything_in_one(log):
    whole, parts = SumMetrics(), [SumMetrics() for _ in range(4)]
    for kind, value, weight, dataset, teacher, part in log:
        for metrics in (whole, parts[part]):
            if kind == "add":
                metrics.add("ratio", value, weight, dataset=dataset, teacher=teacher)
            elif kind == "max":
                metrics.add_max("top", value, dataset=dataset, teacher=teacher)
            else:
                metrics.add_count("count", weight, dataset=dataset, teacher=teacher)
    merged = SumMetrics()
    for part in parts:
        merged.merge(part)
    assert merged.as_dict() == pytest.approx(whole.as_dict(), rel=1e-9, abs=1e-9)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_overlapping_stages_each_get_their_wall_time_and_other_the_uncovered_rest():
    clock = Clock()
    timer = StageTimer(clock)
    clock.now = 1
    with timer.stage("sampling"):
        clock.now = 3
        with timer.stage("scoring"):
            clock.now = 4
    clock.now = 6
    assert timer.lap() == {"time/sampling": 3, "time/scoring": 1, "time/other": 3, "time/total": 6}


def test_a_stage_entered_twice_at_once_counts_once():
    clock = Clock()
    timer = StageTimer(clock)
    first, second = timer.stage("sampling"), timer.stage("sampling")
    first.__enter__()
    clock.now = 2
    second.__enter__()
    clock.now = 3
    first.__exit__(None, None, None)
    clock.now = 5
    second.__exit__(None, None, None)
    assert timer.lap()["time/sampling"] == 5


def test_a_lap_splits_a_stage_that_is_on_and_starts_the_others_anew():
    clock = Clock()
    timer = StageTimer(clock)
    with timer.stage("training"):
        clock.now = 1
    with timer.stage("sampling"):
        clock.now = 4
        first = timer.lap()
        clock.now = 9
    second = timer.lap()
    assert (first["time/training"], first["time/sampling"]) == (1, 3)
    assert second == {"time/sampling": 5, "time/other": 0, "time/total": 5}


def test_a_stage_ends_when_its_body_raises():
    clock = Clock()
    timer = StageTimer(clock)
    with pytest.raises(KeyError), timer.stage("sampling"):
        clock.now = 2
        raise KeyError
    clock.now = 5
    assert timer.lap() == {"time/sampling": 2, "time/other": 3, "time/total": 5}


def test_threads_in_one_stage_never_exceed_the_wall():
    timer = StageTimer()
    threads = [threading.Thread(target=lambda: _stay(timer)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    row = timer.lap()
    assert 0 < row["time/sampling"] <= row["time/total"]


def _stay(timer):
    for _ in range(50):
        with timer.stage("sampling"):
            pass


def test_peak_memory_is_of_this_process_and_stays_when_memory_is_freed():
    script = (
        "from training.metrics import peak_memory_mb as peak\n"
        "before = peak('cpu'); block = bytearray(b'x') * (200 * 2**20); del block; print(before, peak('cpu'))"
    )
    ballast = bytearray(b"x") * (300 * 2**20)  # a child must not report its parent's peak
    child = [sys.executable, "-c", script]
    done = subprocess.run(child, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    before, after = map(float, done.stdout.split())
    assert len(ballast) and before < 200 and 190 < after - before < 230
