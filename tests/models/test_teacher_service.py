"""The teacher service and its client through real sockets: what every scorer must do, and what is theirs alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import conformance
import pytest
import tiny
from conformance import ScorerEngine
from teacher_services import Running, llama, running, served


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTEGE_CACHE", str(tmp_path))
    return tmp_path / "heads"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class TestRemoteScorer(conformance.ScorerSuite):
    @pytest.fixture(scope="class")
    def service(self) -> Iterator[Running]:
        with running(served(llama())) as service:
            yield service

    @pytest.fixture
    def engine(self, service: Running) -> ScorerEngine:
        model = tiny.model()
        return ScorerEngine(
            make=lambda temperature: service.scorer(temperature, hidden_dtype="float32"),
            vocab_size=tiny.VOCAB,
            reference=lambda prompt, answer, temperature: tiny.plain_logprobs(model, prompt, answer, temperature),
            distribution=lambda ids, temperature: tiny.plain_distribution(model, ids, temperature),
        )
