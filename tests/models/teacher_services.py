"""A teacher service on a free loopback port, in a thread of this process, and its clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
import tiny

from models.causal_lm import CausalLM
from models.teacher_service.client import RemoteScorer, describe
from models.teacher_service.hosting import Checkpoint, ServedModel
from models.teacher_service.messages import ModelInfo, ServiceInfo
from models.teacher_service.server import Service, ServiceLimits
from models.teacher_service.serving import listen, make_server

pytest.importorskip("uvicorn", reason="needs the packages of the extra `serve`, which `dev` brings")

TOKEN = "correct-horse-battery-staple"


def served(
    lm: CausalLM,
    name: str = "t",
    *,
    weights: str = "w",
    load: Callable[[], CausalLM] | None = None,
    token_budget: int = 24,
) -> ServedModel:
    """A model in memory as one that is loaded on demand."""
    info = ModelInfo(
        name=name,
        weights=weights,
        tokenizer="tok",
        vocab_size=lm.vocab_size,
        context_length=512,
        hidden_size=lm.model.config.hidden_size,
        dtype="float32",
    )
    return ServedModel(info, Checkpoint(load or (lambda: lm), token_budget=token_budget))


@dataclass
class Running:
    url: str
    service: Service
    info: ServiceInfo
    stop: Callable[[], None]

    def scorer(self, temperature: float = 1.0, *, model: str = "t", token: str = TOKEN, **options: Any) -> RemoteScorer:
        return RemoteScorer("far", self.url, self.info, model, temperature=temperature, token=token, **options)


@contextmanager
def running(
    *models: ServedModel, token: str | None = TOKEN, limits: ServiceLimits | None = None, port: int = 0
) -> Iterator[Running]:
    """A service that is answering, until the block ends."""
    service = Service(models, token=token, limits=limits)
    server, socket = make_server(service), listen("127.0.0.1", port, token=token)
    thread = threading.Thread(target=lambda: anyio.run(lambda: server.serve(sockets=[socket])))
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(30)
        socket.close()
        assert not thread.is_alive(), "the service did not end"

    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the service did not start"
            time.sleep(0.005)
        yield Running(f"http://127.0.0.1:{socket.getsockname()[1]}", service, service.info, stop)
    finally:
        stop()


def llama(seed: int = 0, architecture: str = "llama") -> CausalLM:
    return CausalLM.verified(tiny.model(architecture, seed=seed))


__all__ = ["TOKEN", "Running", "Sequence", "describe", "llama", "running", "served"]
