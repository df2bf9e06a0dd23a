"""A transfer that cannot go on is broken off, whoever waits for whom. The half of vLLM that is here is a double."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch
from scripted_vllm import Weights

from errors import ProtegeError
from models.http_clients import own_place
from models.vllm import transfer
from models.vllm.engine import Unreachable
from models.vllm.transfer import Backend, Sender

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Half:
    """As vLLM's for NCCL: the engine's call and a collective run beside each other, and each waits for the other."""

    client: Any
    source: Any
    meeting: dict[str, Any]
    collective: Callable[[Half], None]
    down: threading.Event = field(default_factory=threading.Event)
    freed: threading.Event = field(default_factory=threading.Event)  # by the test's end
    sent: list[list[str]] = field(default_factory=list)

    def send_weights(self) -> None:
        self.client.start_weight_update()
        call = threading.Thread(target=self._update, daemon=True)
        call.start()
        self.collective(self)
        call.join()
        self.client.finish_weight_update()
        self.sent.append([name for name, _ in self.source])

    def _update(self) -> None:
        with contextlib.suppress(Exception):  # vLLM looks at it when the collective is over
            self.client.update_weights({"names": [meta.name for meta in self.source.metadata()]})

    def shutdown(self) -> None:
        self.down.set()


def joined(half: Half) -> None:
    """Everybody has come."""


def until_aborted(half: Half) -> None:
    """Somebody is missing."""
    half.down.wait(30)
    raise RuntimeError("communicator was aborted")


def for_ever(half: Half) -> None:
    """And the communicator cannot be aborted."""
    half.freed.wait(30)


def lost(half: Half) -> None:
    raise RuntimeError("remote process exited")


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Half]]:
    made: list[Half] = []

    class Factory:
        collective = staticmethod(joined)

        @classmethod
        def trainer_init(cls, info: dict[str, Any], *, client: Any, source: Any) -> Half:
            client.init_weight_transfer_engine({"told": info})
            made.append(Half(client, source, info, cls.collective))
            return made[-1]

    transfer._source_class.cache_clear()
    base = SimpleNamespace(WeightSource=object, ParamMeta=lambda name, *rest: SimpleNamespace(name=name))
    prefix = "vllm.distributed.weight_transfer"
    monkeypatch.setitem(sys.modules, f"{prefix}.base", base)  # type: ignore[arg-type]
    monkeypatch.setitem(
        sys.modules,
        f"{prefix}.factory",
        SimpleNamespace(WeightTransferTrainerFactory=Factory),  # type: ignore[arg-type]
    )
    monkeypatch.setitem(sys.modules, "half", SimpleNamespace(Info=lambda rank, **told: told))  # type: ignore[arg-type]
    monkeypatch.setitem(transfer.BACKENDS, "half", Backend("half", "Info", {"packed": True}, meets=True))
    monkeypatch.setattr(transfer, "LATE_S", 0.3)
    monkeypatch.setattr(transfer, "END_S", 0.5)
    yield made
    for half in made:
        half.freed.set()
    transfer._source_class.cache_clear()


@dataclass
class Engine:
    """What is asked of it; `update_weights` ends as `update` does."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    update: Callable[[], Any] | None = None

    async def call(self, method: str, argument: Any = None) -> None:
        self.calls.append((method, argument))
        if method == "update_weights" and self.update is not None:
            await self.update()


async def dies() -> None:
    await anyio.sleep(0.05)  # later than the collective
    raise Unreachable("here cannot be reached")


def of(monkeypatch: pytest.MonkeyPatch, collective: Callable[[Half], None]) -> None:
    factory: Any = sys.modules["vllm.distributed.weight_transfer.factory"]
    monkeypatch.setattr(factory.WeightTransferTrainerFactory, "collective", staticmethod(collective))


async def test_the_halves_meet_once_and_keep_no_weights_between_two_transfers(halves: list[Half]):
    engine = Engine()
    sender = Sender("here", "half", engine.call, master_port=7)
    await sender.send(Weights())
    await sender.send(Weights())
    (half,) = halves
    assert half.meeting == {"packed": True, "master_port": 7} and half.sent == [["value"]] * 2
    update = [("start_weight_update", None), ("update_weights", {"names": ["value"]}), ("finish_weight_update", None)]
    assert engine.calls == [("init_weight_transfer_engine", {"told": half.meeting}), *update, *update]
    await sender.close()
    assert half.down.is_set()


@pytest.mark.parametrize("collective", [joined, lost, for_ever])
async def test_no_copy_of_the_weights_outlives_its_transfer(
    halves: list[Half], monkeypatch: pytest.MonkeyPatch, collective: Any
):
    of(monkeypatch, collective)
    kept: list[Any] = []

    class Watched(Weights):
        def tensors(self) -> dict[str, torch.Tensor]:
            tensors = super().tensors()
            kept.append(weakref.ref(tensors["value"]))
            return tensors

    sender = Sender("here", "half", Engine(update=None if collective is joined else dies).call)
    gc.disable()
    try:
        with contextlib.suppress(Unreachable):
            await sender.send(Watched())
        assert [ref() for ref in kept] == [None]
    finally:
        gc.enable()


async def test_what_is_not_sent_when_a_transfer_is_broken_off_is_never_sent(
    halves: list[Half], monkeypatch: pytest.MonkeyPatch
):
    """vLLM's half goes on with the next part when the abort has freed it: with a communicator that is gone."""
    parts: list[str] = []

    def goes_on(half: Half) -> None:
        half.down.wait(30)
        parts.extend(name for name, _ in half.source)

    of(monkeypatch, goes_on)

    with pytest.raises(Unreachable):
        await Sender("here", "half", Engine(update=dies).call).send(Weights())
    await _until(lambda: not _threads())
    assert parts == []


async def test_a_server_that_dies_in_the_midst_frees_who_waits_for_it(
    halves: list[Half], monkeypatch: pytest.MonkeyPatch
):
    """vLLM's half waits in the collective; the call that has failed is what tells."""
    of(monkeypatch, until_aborted)

    started = time.monotonic()
    with pytest.raises(Unreachable, match="cannot be reached"):
        await Sender("here", "half", Engine(update=dies).call).send(Weights())
    assert time.monotonic() - started < 5 and halves[0].down.is_set()
    await _until(lambda: not _threads())


async def test_what_the_engine_says_goes_before_what_the_transport_says(
    halves: list[Half], monkeypatch: pytest.MonkeyPatch
):
    of(monkeypatch, lost)

    with pytest.raises(Unreachable):
        await Sender("here", "half", Engine(update=dies).call).send(Weights())
    with pytest.raises(ProtegeError, match=r"handed over by half \(RuntimeError: remote process exited\).*=folder"):
        await Sender("here", "half", Engine().call).send(Weights())
    assert all(half.down.is_set() for half in halves)


async def test_a_transfer_that_takes_too_long_is_broken_off(halves: list[Half], monkeypatch: pytest.MonkeyPatch):
    of(monkeypatch, until_aborted)
    aborted = asyncio.Event()

    async def freezes() -> None:
        try:
            await anyio.sleep(30)
        finally:
            aborted.set()

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        with anyio.fail_after(0.3):
            await Sender("here", "half", Engine(update=freezes).call).send(Weights())
    assert time.monotonic() - started < 5 and halves[0].down.is_set()
    await asyncio.wait_for(aborted.wait(), 5)  # nor does the request go on
    await _until(lambda: not _threads())


async def test_a_transport_that_cannot_be_aborted_is_left_behind(halves: list[Half], monkeypatch: pytest.MonkeyPatch):
    """In a thread that does not keep this process from ending."""
    of(monkeypatch, for_ever)

    started = time.monotonic()
    with pytest.raises(Unreachable):
        await Sender("here", "half", Engine(update=dies).call).send(Weights())
    assert time.monotonic() - started < 5
    assert [thread.daemon for thread in _threads()] == [True]


async def test_weights_that_cannot_be_computed_reach_nobody(halves: list[Half]):
    engine = Engine()
    with pytest.raises(ProtegeError, match="no memory"):
        await Sender("here", "half", engine.call).send(Weights(error=ProtegeError("no memory")))
    assert engine.calls == [] and halves == []


def test_servers_find_this_machine_at_an_address_of_its_own():
    address, port = own_place("http://127.0.0.1:8000")
    assert address == "127.0.0.1" and 1024 < port < 65536
    with pytest.raises(OSError):
        own_place("http://no.such.host.invalid:8000")


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weight transfer"]


async def _until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not true():
            await anyio.sleep(0.01)
