"""Signals to recipes while they hand weights over, and to what a run does before its loop."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
import tiny_models
from test_signals import until_said

from recipes import capture_teacher, evaluate_harbor, training_run
from recipes.tiny_tool_models import make_models
from tests.models.scripted_server import ScriptedServer, serving
from training.loop import Loop

TERM, INT = signal.SIGTERM, signal.SIGINT
DATA = {"dataset": "arithmetic", "eval_size": 4, "max_tokens": 6, "device": "cpu"}
TASKS = {"task_names": "edit-json", "max_tokens": 12, "max_trajectory_tokens": 2500, "device": "cpu"}


@dataclass
class ReadingServer(ScriptedServer):
    """Has read its new weights `times` times, then never again; `stuck`: nor does it resume."""

    times: int = 0
    stuck: bool = False
    reads: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def _control(self, route: str, body: Any) -> tuple[int, Any]:
        last = route == "/collective_rpc" and len(self.loaded) == self.times
        if last:
            self.reads.set()
        if last or (route == "/resume" and self.stuck):
            self.over.wait(60)
        return super()._control(route, body)

    def routes(self) -> list[str]:
        return [path.partition("?")[0] for path, _, _ in self.requests]

    def __exit__(self, *error: object) -> None:
        self.over.set()
        super().__exit__(*error)


def reading(folder: str, **options: Any) -> ReadingServer:
    made = serving(folder)
    return ReadingServer(made.logits, made.vocab_size, tokenizer=made.tokenizer, root=folder, max_model_len=4096,
                         **options)  # fmt: skip


def until_it_reads(server: ReadingServer, process: Any, output: Path) -> None:
    while not server.reads.wait(0.05):
        assert process.exitcode is None, output.read_text()


def without_an_engine() -> None:
    """Tasks are not begun before there are weights to sample from."""
    evaluate_harbor.prepare_engine = lambda data, runtime: None


def start(recipe: str, folder: Path, **options: Any) -> Any:
    argv = [f"{key}={value}" for key, value in options.items()]
    first = without_an_engine if recipe == "evaluate_harbor" else None
    return tiny_models.start(argv, folder / "output", recipe=recipe, first=first)


@pytest.fixture(scope="session")
def tool_student(made: Path) -> str:
    return make_models(made / "tool-models", context=4096)[0]


@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize("recipe", ["evaluate", "evaluate_harbor"])
def test_weights_that_are_handed_over_leave_no_folder_and_no_paused_server(
    tmp_path: Path, student: str, tool_student: str, recipe: str, number: int
):
    model = student if recipe == "evaluate" else tool_student
    options = (
        {"output_path": tmp_path / "numbers.json", **DATA}
        if recipe == "evaluate"
        else {"log_path": tmp_path / "run", **TASKS}
    )
    with reading(model) as server:
        process = start(recipe, tmp_path, model_name=model, **options | {"sampler.url": server.url})
        until_it_reads(server, process, tmp_path / "output")
        assert len(tiny_models.leftovers(tmp_path)) == 1, "it would be left behind"
        os.kill(process.pid, number)
        assert tiny_models.finish(process) == 128 + number
        assert server.routes()[-1] == "/resume", "after /pause"
    assert tiny_models.leftovers(tmp_path) == []
    said = (tmp_path / "output").read_text()
    assert "stopping" in said and "interrupted" in said and "Traceback" not in said


def test_a_step_whose_weights_a_server_never_has_read_is_saved_at_once(tmp_path: Path, models: dict[str, str]):
    with reading(models["model_name"], times=2) as server:
        argv = tiny_models.argv(tmp_path / "run", models, max_steps=9, sampler__url=server.url)
        process = tiny_models.start(argv, tmp_path / "output")
        until_it_reads(server, process, tmp_path / "output")
        started = time.monotonic()
        os.kill(process.pid or 0, TERM)
        assert tiny_models.finish(process) == 143
        assert time.monotonic() - started < 30, "its limit is half an hour"
        assert server.routes()[-1] == "/resume"
    assert tiny_models.final(tmp_path / "run").name == "step_000002" and tiny_models.leftovers(tmp_path) == []
    assert [row["step"] for row in tiny_models.training_rows(tmp_path / "run")] == [1, 2]


def test_a_second_signal_does_not_wait_for_a_server(tmp_path: Path, student: str):
    with reading(student, stuck=True) as server:
        options = {"sampler.url": server.url, "output_path": tmp_path / "numbers.json", **DATA}
        process = start("evaluate", tmp_path, model_name=student, **options)
        until_it_reads(server, process, tmp_path / "output")
        os.kill(process.pid, TERM)
        until_said(tmp_path / "output", "stopping", process)
        time.sleep(0.3)
        assert process.exitcode is None, "the server is to be resumed"
        os.kill(process.pid, TERM)
        started = time.monotonic()
        assert tiny_models.finish(process) == 143 and time.monotonic() - started < 10


def wait_in_evaluations_of_teachers() -> None:
    async def wait(*_: Any) -> None:
        print("evaluating the teacher", flush=True)
        try:
            await anyio.sleep(1000)
        finally:
            print("cleaned up", flush=True)

    training_run._evaluate_teachers = wait
    Loop.run = None  # type: ignore[method-assign, assignment]  # it is not reached


def test_a_run_that_evaluates_its_teacher_first_ends_in_order(tmp_path: Path, models: dict[str, str]):
    argv = tiny_models.argv(tmp_path / "run", models, eval_teacher=True)
    process = tiny_models.start(argv, tmp_path / "output", first=wait_in_evaluations_of_teachers)
    until_said(tmp_path / "output", "evaluating the teacher", process)
    assert process.pid is not None
    os.kill(process.pid, TERM)
    assert tiny_models.finish(process) == 143
    assert "cleaned up" in (tmp_path / "output").read_text() and not (tmp_path / "run").exists()


def sample_for_ever() -> None:
    async def wait(*_: Any, **__: Any) -> None:
        print("sampling", flush=True)
        await anyio.sleep(1000)

    capture_teacher.sampled_answers = wait


def test_a_capture_that_is_stopped_closes_its_sampler_and_goes_on(tmp_path: Path, teacher: str):
    given = {
        "teacher_model": teacher,
        "dataset": "arithmetic",
        "max_rows": 3,
        "completions": "teacher",
        "max_tokens": 4,
    }
    options = {**given, "output_path": tmp_path / "capture.jsonl", "device": "cpu"}
    argv = [f"{key}={value}" for key, value in options.items()]
    process = tiny_models.start(argv, tmp_path / "output", recipe="capture_teacher", first=sample_for_ever)
    until_said(tmp_path / "output", "sampling", process)
    assert process.pid is not None
    os.kill(process.pid, TERM)
    assert tiny_models.finish(process) == 143
    assert "interrupted" in (tmp_path / "output").read_text()
    again = tiny_models.start(argv, tmp_path / "again", recipe="capture_teacher")
    assert tiny_models.finish(again) == 0, (tmp_path / "again").read_text()
    assert len((tmp_path / "capture.jsonl").read_text().splitlines()) == 4
