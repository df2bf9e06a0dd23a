"""How `recipes.serve_teacher` ends: real signals to real processes, at every moment of their lives."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import httpx2
import numpy as np
import pytest
from service_process import ENDS_IN_S, started

from models.teacher_service.messages import Reading, RequestFields, ScoreRequest, encode_request
from models.teacher_service.wire import MEDIA_TYPE

CUT_SHORT = "ended with work that was not finished in time"

TERM, INT = signal.SIGTERM, signal.SIGINT
EXIT_CODES = {TERM: 0, INT: 130}


class Asking(threading.Thread):
    """A client with one request; `result` is its status, or how it was cut off."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.result: int | str = ""
        self.start()

    def run(self) -> None:
        with httpx2.Client(trust_env=False, timeout=ENDS_IN_S) as client:
            (model,) = client.get(f"{self.url}/info").json()["models"]
            fields = RequestFields(model="t", weights=model["weights"], need="sampled", temperature=1.0)
            body = encode_request(ScoreRequest(fields, [Reading(np.arange(1, 9), np.arange(1, 8))]))
            try:
                self.result = client.post(
                    f"{self.url}/score", content=body, headers={"content-type": MEDIA_TYPE}
                ).status_code
            except httpx2.TransportError as error:
                self.result = type(error).__name__

    def answer(self) -> int | str:
        self.join(ENDS_IN_S)
        return self.result


@pytest.mark.parametrize("number", [TERM, pytest.param(INT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", ["serve", "startup", "main_loop"])
def test_a_signal_while_it_starts_to_serve_is_not_lost(tmp_path: Path, teacher: str, moment: str, number: int):
    """`serve` is called after it said that it serves, and before uvicorn has done anything."""
    with started(tmp_path, teacher, hook=f"{moment}:{int(number)}") as service:
        assert service.exit_code() == EXIT_CODES[number]
        assert "serving on" in service.output.read_text() and "Traceback" not in service.output.read_text()


@pytest.mark.parametrize("number", [TERM, pytest.param(INT, marks=pytest.mark.slow)])
def test_what_is_being_scored_is_answered_and_what_comes_later_is_not(tmp_path: Path, teacher: str, number: int):
    with started(tmp_path, teacher, hook="batch", work_s=1.0, grace_s=ENDS_IN_S) as service:
        asking = Asking(service.url)
        service.wait_for("in _score")
        service.send(number)
        assert asking.answer() == 200
        assert service.exit_code() == EXIT_CODES[number]
        assert "Traceback" not in service.output.read_text()
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{service.url}/health", trust_env=False)


@pytest.mark.parametrize("number", [TERM, pytest.param(INT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("work", ["load", "batch"])
def test_work_that_takes_longer_than_the_grace_is_cut(tmp_path: Path, teacher: str, work: str, number: int):
    with started(tmp_path, teacher, hook=work, work_s=10 * ENDS_IN_S) as service:
        asking = Asking(service.url)
        service.wait_for("in (load_model|_score)")
        service.send(number)
        assert service.exit_code() == EXIT_CODES[number]
        assert CUT_SHORT in service.output.read_text()
        assert "Error" in str(asking.answer()), "its client is told by the connection's end, and asks again"


def test_a_second_signal_ends_it_at_once(tmp_path: Path, teacher: str):
    with started(tmp_path, teacher, hook="batch", work_s=10 * ENDS_IN_S, grace_s=10 * ENDS_IN_S) as service:
        asking = Asking(service.url)
        service.wait_for("in _score")
        service.send(TERM)
        service.process.join(0.3)
        assert service.process.exitcode is None, "it waits for what is being scored"
        service.send(INT)
        assert service.exit_code() == 130
        assert "Error" in str(asking.answer())


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_signal_before_it_serves_ends_it_as_any_recipe(tmp_path: Path, teacher: str, number: int):
    with started(tmp_path, teacher, hook=f"served_models:{int(number)}") as service:
        assert service.exit_code() == 128 + number
        assert "serving on" not in service.output.read_text() and "Traceback" not in service.output.read_text()
