"""New weights through vLLM's own weight transfer: memory to memory, without a folder.

vLLM's two halves do the transport, one here and one in its worker. What is ours is what is sent, the same names and
types that `WeightSource.save` writes, and the way from vLLM's half here, which blocks, to the engine's event loop.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.types import WeightSource

CALL_S = 1800.0  # an engine that takes longer over one call has frozen


@dataclass(frozen=True)
class Backend:
    """One of vLLM's transports, by its name there."""

    module: str
    init_info: str  # class of what the half here is told
    options: Mapping[str, Any]

    def make_init_info(self) -> Any:
        return getattr(importlib.import_module(self.module), self.init_info)(rank=0, **self.options)


BACKENDS = {
    # Packed: a buffer of 1 GB at a time, and not a handle for every tensor.
    "ipc": Backend("vllm.distributed.weight_transfer.ipc_engine", "IPCTrainerInitInfo", {"packed": True})
}

Call = Callable[..., Coroutine[Any, Any, Any]]
"""A method of the engine by its name, with its arguments."""


class Sender:
    """vLLM's half in this process, for one engine. Its methods block: not for the event loop's thread."""

    def __init__(self, backend: str, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        self._backend, self._client = backend, _Client(call, loop)
        self._half: Any = None

    def send(self, source: WeightSource) -> None:
        """Raises what the engine raises, `TimeoutError`, and whatever the transport does."""
        base = importlib.import_module("vllm.distributed.weight_transfer.factory")
        if self._half is None:
            info = BACKENDS[self._backend].make_init_info()
            self._half = base.WeightTransferTrainerFactory.trainer_init(
                info, client=self._client, source=_vllm_source(source)
            )
        self._half.source = _vllm_source(source)
        self._half.send_weights()


class _Client:
    """vLLM's `VLLMWeightSyncClient` on an engine in this process."""

    def __init__(self, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        self._call, self._loop = call, loop
        self._requests = importlib.import_module("vllm.distributed.weight_transfer.base")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._wait("init_weight_transfer_engine", self._requests.WeightTransferInitRequest(init_info))

    def start_weight_update(self) -> None:
        self._wait("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._wait("update_weights", self._requests.WeightTransferUpdateRequest(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait("finish_weight_update", weight_version)

    def _wait(self, method: str, *arguments: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._call(method, *arguments), self._loop).result(CALL_S)


def _vllm_source(source: WeightSource) -> Any:
    base = importlib.import_module("vllm.distributed.weight_transfer.base")

    class Source(base.WeightSource):
        def metadata(self) -> list[Any]:
            return [base.ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(source.tensors().items())

    return Source()
