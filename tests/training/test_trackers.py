"""Trackers mirror rows, and never stop a run."""

import logging
import sys
import threading
import time
import types

import pytest

from errors import ConfigError
from training.trackers import open_trackers


class FakeRun:
    """Stands in for the wandb and trackio modules alike: records its calls, fails on demand."""

    def __init__(self, fail_at=None):
        self.started, self.rows, self.finished, self.fail_at = [], [], 0, fail_at

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        if step == self.fail_at:
            raise OSError("network is down")
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


def install(monkeypatch, name, fake):
    module = types.ModuleType(name)
    for attribute in ("init", "log", "finish"):
        setattr(module, attribute, getattr(fake, attribute))
    monkeypatch.setitem(sys.modules, name, module)


def test_rows_reach_each_tracker_without_what_is_no_finite_number(monkeypatch, tmp_path):
    fakes = {"wandb": FakeRun(), "trackio": FakeRun()}
    for name, fake in fakes.items():
        install(monkeypatch, name, fake)
    trackers = open_trackers(["trackio"], tmp_path, {"seed": 1}, wandb_project="distil")
    trackers.log({"step": 3, "kl": 0.5, "loss": float("nan"), "accuracy": None, "note": "x"})
    trackers.close()
    for fake in fakes.values():
        assert fake.rows == [(3, {"kl": 0.5})] and fake.finished == 1
        assert fake.started[0]["project"] == "distil" and fake.started[0]["config"] == {"seed": 1}


def test_a_tracker_that_never_ends_is_left_behind(monkeypatch, tmp_path, caplog):
    class Silent(FakeRun):
        def finish(self):
            threading.Event().wait(60)

    monkeypatch.setattr("training.trackers.CLOSE_S", 0.2)
    other = FakeRun()
    install(monkeypatch, "wandb", Silent())
    install(monkeypatch, "trackio", other)
    trackers = open_trackers(["wandb", "trackio"], tmp_path, {})
    started = time.monotonic()
    trackers.close()
    assert time.monotonic() - started < 10 and other.finished == 1
    assert caplog.messages == ["tracker wandb did not end within 0.2 s: what it had not sent yet is left"]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(monkeypatch, tmp_path):
    fake = FakeRun()
    install(monkeypatch, "wandb", fake)
    for _ in range(2):
        open_trackers(["wandb"], tmp_path, {}).close()
    first, second = fake.started
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["dir"] == str(tmp_path)


def test_a_failing_tracker_warns_once_and_is_left_out_while_the_others_go_on(monkeypatch, tmp_path, caplog):
    broken, sound = FakeRun(fail_at=2), FakeRun()
    install(monkeypatch, "wandb", broken)
    install(monkeypatch, "trackio", sound)
    trackers = open_trackers(["wandb", "trackio"], tmp_path, {})
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            trackers.log({"step": step, "kl": 1.0})
    assert [step for step, _ in sound.rows] == [1, 2, 3, 4]
    assert [step for step, _ in broken.rows] == [1] and trackers.active == ("trackio",)
    assert len(caplog.records) == 1 and "wandb" in caplog.text and "network is down" in caplog.text


def test_a_tracker_that_cannot_start_is_a_warning(monkeypatch, tmp_path, caplog):
    fake = FakeRun()
    install(monkeypatch, "wandb", fake)
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    assert open_trackers(["wandb"], tmp_path, {}).active == ()
    assert "wandb" in caplog.text


def test_a_missing_package_is_refused_with_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        open_trackers([], tmp_path, {}, wandb_project="distil")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean tensorboard"):
        open_trackers(["tensorbord"], tmp_path, {})


def test_tensorboard_files_lie_in_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    trackers = open_trackers(["tensorboard"], tmp_path, {})
    trackers.log({"step": 1, "kl": 0.5})
    trackers.close()
    assert list((tmp_path / "tensorboard").glob("events*"))
