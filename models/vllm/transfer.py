"""New weights through vLLM's own weight transfer: memory to memory, without a folder.

vLLM's two halves do the transport, one here and one in its worker. What is ours is what is sent, the same names and
types that `WeightSource.save` writes, the way from vLLM's half here, which blocks, to the engine's calls, which do not,
and an end to both where the other side is gone: a collective waits for its members for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import anyio
import torch
from torch import Tensor

from errors import ProtegeError
from models.device_thread import compute
from models.types import WeightSource
from models.vllm.engine import Transient

LATE_S = 2.0  # when one side fails the other often does, too: what the engine says of it, which is nearer, may be late
END_S = 10.0  # that vLLM's half here may take to end when it is broken off; then it is left behind


@dataclass(frozen=True)
class Backend:
    """One of vLLM's transports, by its name there."""

    module: str
    init_info: str  # class of what the half here is told
    options: Mapping[str, Any]
    meets: bool = False  # the halves find each other at an address of this machine

    def make_init_info(self, **meeting: Any) -> Any:
        return getattr(importlib.import_module(self.module), self.init_info)(rank=0, **self.options, **meeting)


BACKENDS = {
    # Packed: a buffer of 1 GB at a time, and not a handle or a collective for every tensor.
    "ipc": Backend("vllm.distributed.weight_transfer.ipc_engine", "IPCTrainerInitInfo", {"packed": True}),
    "nccl": Backend(
        "vllm.distributed.weight_transfer.nccl_engine", "NCCLTrainerInitInfo", {"packed": True}, meets=True
    ),
}

Call = Callable[..., Coroutine[Any, Any, Any]]
"""One of the four calls of vLLM's `VLLMWeightSyncClient`, by its name, with its one argument if it has one."""


class Sender:
    """vLLM's half in this process, for one engine. After an error it is of no further use."""

    def __init__(self, engine: str, backend: str, call: Call, **meeting: Any) -> None:
        """`meeting`: where the halves find each other, for a backend that `meets`."""
        self._engine, self._name, self._meeting = engine, backend, meeting
        self._client = _Client(call)
        self._half: Any = None
        self._sending: asyncio.Future[None] | None = None
        self._closed = False
        self._lock = threading.Lock()

    async def send(self, source: WeightSource) -> None:
        """Raises what the engine raises, else `ProtegeError`. Cancelled, it breaks the transfer off."""
        tensors: dict[str, Tensor] = {}
        try:
            tensors |= await compute(_settled, source)
            refused = self._client.attend()
            self._sending = sent = _in_thread(self._send, tensors)
            await asyncio.wait([sent, refused], return_when=asyncio.FIRST_COMPLETED)
            if sent.done() and (error := sent.exception()) is not None:
                await asyncio.wait([refused], timeout=LATE_S)
                raise refused.result() if refused.done() else error
            if not sent.done():
                raise refused.result()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self.close()
            if not isinstance(error, Exception) or isinstance(error, (ProtegeError, Transient)):
                raise
            raise ProtegeError(  # vLLM's half here, or the device
                f"{self._engine}: the weights could not be handed over by {self._name} ({type(error).__name__}: "
                f"{error}). The run can be resumed, also with sampler.handover=folder"
            ) from error
        finally:
            tensors.clear()  # a copy of the weights, which a thread that is stuck, or a traceback, may still name

    async def close(self) -> None:
        """Frees what the transport holds, and whoever waits in it."""
        if self._closed:
            return
        self._closed = True
        self._client.dismiss()
        ending = [_in_thread(self._shut_down), *([] if self._sending is None else [self._sending])]
        await asyncio.wait(ending, timeout=END_S)

    def _send(self, tensors: Mapping[str, Tensor]) -> None:
        """Blocks, in a collective perhaps for ever: in a thread of its own."""
        source = _source_class()(tensors, self._client)
        try:
            if (device := next(iter(tensors.values())).device).type == "cuda":
                torch.cuda.set_device(device)
            if self._half is None:
                factory = importlib.import_module("vllm.distributed.weight_transfer.factory")
                info = BACKENDS[self._name].make_init_info(**self._meeting)
                self._half = factory.WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=source)
            half = self._half
            half.source = source
            half.send_weights()
        except BaseException:
            self._shut_down()
            raise

    def _shut_down(self) -> None:
        with self._lock:
            half, self._half = self._half, None
        if half is not None:
            half.shutdown()  # of NCCL: aborts the communicator, and so the collectives that it is in


class _Client:
    """vLLM's `VLLMWeightSyncClient`: its threads wait here for calls that run on the event loop."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed: asyncio.Future[BaseException] | None = None
        self._waiting: set[Future[Any]] = set()

    def attend(self) -> asyncio.Future[BaseException]:
        """From now on calls are made. Returns the first error of one, when there is one."""
        self._loop = asyncio.get_running_loop()
        self._failed = self._loop.create_future()
        return self._failed

    def dismiss(self) -> None:
        """No call is made any more, and who waits for one gets an error."""
        self._loop = None
        for call in list(self._waiting):
            call.cancel()

    def check(self) -> asyncio.AbstractEventLoop:
        """The loop that calls run on. Raises RuntimeError once it is dismissed."""
        if self._loop is None:
            raise RuntimeError("the transfer was broken off")
        return self._loop

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._wait("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._wait("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._wait("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        assert weight_version is None, "the label is given after the weights"
        self._wait("finish_weight_update")

    def _wait(self, method: str, *argument: Any) -> None:
        loop = self.check()
        call = asyncio.run_coroutine_threadsafe(self._made(method, *argument), loop)
        self._waiting.add(call)
        if self._loop is None:  # dismissed meanwhile
            call.cancel()
        try:
            call.result()
        finally:
            self._waiting.discard(call)

    async def _made(self, method: str, *argument: Any) -> None:
        try:
            await self._call(method, *argument)
        except Exception as error:
            if self._failed is not None and not self._failed.done():
                self._failed.set_result(error)
            raise


def _settled(source: WeightSource) -> dict[str, Tensor]:
    """The tensors, computed to the end: another thread is going to read them."""
    tensors = dict(source.tensors())
    if (device := next(iter(tensors.values())).device).type == "cuda":
        torch.cuda.synchronize(device)  # why: without it, cuda:0
    return tensors


def _in_thread(function: Callable[..., None], *arguments: Any) -> asyncio.Future[None]:
    """A thread that nobody has to wait for: not this process's end, either, if it is stuck for ever."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def run() -> None:
        try:
            function(*arguments)
            result = None
        except Exception as error:
            result = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the run has ended meanwhile
            loop.call_soon_threadsafe(settle, result)
        result = None  # it names this frame

    done.add_done_callback(lambda done: done.exception())  # else asyncio says that nobody asked for it
    threading.Thread(target=run, name="weight transfer", daemon=True).start()
    return done


@functools.cache
def _source_class() -> Any:
    """Not at the top: the rest of Protege runs without vLLM."""
    base = importlib.import_module("vllm.distributed.weight_transfer.base")

    class Source(base.WeightSource):
        def __init__(self, tensors: Mapping[str, Tensor], client: _Client) -> None:
            self._tensors, self._client = tensors, client

        def metadata(self) -> list[Any]:
            return [base.ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            """Ends with an error when the transfer is broken off: what is not sent yet would go into a communicator
            that is being aborted."""
            for name, tensor in self._tensors.items():
                self._client.check()
                yield name, tensor
            self._client.check()

    return Source
