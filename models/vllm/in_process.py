"""vLLM's engine in this process: its core and workers are child processes, which end with the run."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch

from envs.types import SamplingParams
from errors import ProtegeError, SamplerError
from models.types import WeightSource
from models.vllm.engine import Answer, Outdated, Transient, Unreachable, checked_answer, sampling_params
from models.vllm.orphans import Brood
from models.vllm.transfer import Sender
from models.vllm.worker import EXTENSION

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
RESUME_S = 30.0  # an engine that takes longer has frozen
LOOK_S = 0.5  # between two looks whether an engine that has not answered yet has died
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns at every reload
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a process with threads is not to be forked
}


@dataclass(frozen=True)
class EngineOptions:
    dtype: str  # of the computation: float32 or bfloat16
    max_num_seqs: int  # largest batch
    max_model_len: int | None = None  # None: the model's own
    gpu_memory_utilization: float = 0.9  # of the whole device, weights included
    kv_cache_gib: float | None = None  # None: what gpu_memory_utilization leaves
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    lora_rank: int = 0
    transfer: str | None = None  # of `BACKENDS`: how tensors are handed over; None: in a folder
    sleeps: bool = False  # gives its memory back while the learner trains
    seed: int = 0

    def arguments(self, model: Path) -> dict[str, Any]:
        """Of vLLM's `AsyncEngineArgs`."""
        given: dict[str, Any] = {
            "model": str(model),
            "dtype": self.dtype,
            "max_num_seqs": self.max_num_seqs,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enforce_eager": self.enforce_eager,
            "tensor_parallel_size": self.tensor_parallel_size,
            "seed": self.seed % 2**31,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
            "generation_config": "vllm",  # not the model's
            "enable_prefix_caching": True,
            "enable_sleep_mode": self.sleeps,
            "disable_log_stats": True,
            "worker_extension_cls": EXTENSION,
        }
        if self.kv_cache_gib is not None:
            given["kv_cache_memory_bytes"] = int(self.kv_cache_gib * 2**30)
        if self.transfer is not None:
            given["weight_transfer_config"] = {"backend": self.transfer}
        if self.lora_rank:
            rank = next((rank for rank in LORA_RANKS if rank >= self.lora_rank), self.lora_rank)
            # Two: an old adapter finishes what it has begun while the new one begins.
            given |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 2, "max_cpu_loras": 2}
        return given


class InProcessEngine:
    """`Engine` that belongs to this process. It starts with the first weights that it is given."""

    name = "vLLM's engine in this process"

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._llm: Any = None
        self._brood = Brood()
        self._sender: Sender | None = None
        self._requests = itertools.count()
        self._adapters: dict[str, Any] = {}  # vLLM's requests for them
        self._adapter_ids = itertools.count(1)
        self._asleep = False
        self._power = anyio.Lock()  # requests that come at once all wake it

    @property
    def takes_adapters(self) -> bool:
        return self.options.lora_rank > 0

    @property
    def takes_tensors(self) -> bool:
        return self.options.transfer is not None

    async def open(self) -> None: ...

    @property
    def started(self) -> bool:
        return self._llm is not None

    async def start(self, model: Path, label: str) -> None:
        with anyio.CancelScope(shield=True):  # half an engine could not be ended
            try:
                _leave_device_memory()
                self._llm = await anyio.to_thread.run_sync(_start, self.options.arguments(model), self._brood)
            except Exception as error:
                await anyio.to_thread.run_sync(self._brood.end)
                raise ProtegeError(
                    f"vLLM did not start ({type(error).__name__}: {error}). Its own messages are above; "
                    "see docs/vllm.md for what decides its memory, context and number types"
                ) from error
            await self._call("update_weight_version", label)

    async def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # else it takes the end for a crash, and prints a traceback
            with anyio.CancelScope(shield=True):
                try:
                    await anyio.to_thread.run_sync(llm.shutdown, 10.0)
                finally:
                    await anyio.to_thread.run_sync(self._brood.end)
        self._sender = None
        self._adapters.clear()

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str | None) -> Answer:
        if self._llm is None:
            raise SamplerError(f"{self.name} has no weights yet: update_weights gives it some")
        if adapter is not None and adapter not in self._adapters:
            raise Outdated(f"{self.name} does not have the adapter {adapter}")
        request = asyncio.ensure_future(self._generate(list(prompt_ids), params, self._adapters.get(adapter or "")))
        try:
            await asyncio.wait([request])
        finally:
            if not request.done():  # cancelled: vLLM aborts a request whose task is cancelled, once
                request.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([request])
        return _of_output(self.name, request.result())

    async def _generate(self, prompt_ids: list[int], params: SamplingParams, adapter: Any) -> Any:
        vllm = _import("vllm.sampling_params")
        last = None
        try:
            how = vllm.SamplingParams(**sampling_params(params), output_kind=vllm.RequestOutputKind.FINAL_ONLY)
            name = f"protege-{next(self._requests)}"
            async for output in self._llm.generate({"prompt_token_ids": prompt_ids}, how, name, lora_request=adapter):
                last = output
        except (_import("vllm.exceptions").VLLMClientError, ValueError) as error:
            raise SamplerError(f"{self.name} refused a request: {error}") from error
        except Exception as error:
            self._raise_if_dead(error)
            raise Transient(f"{self.name} failed: {type(error).__name__}: {error.__cause__ or error}") from error
        return last

    async def check_alive(self) -> None:
        if self._llm is None or self._llm.errored:
            raise Unreachable(f"{self.name} has died")

    async def label(self) -> str:
        return str(await self._call("get_weight_version"))

    async def reload(self, folder: Path, label: str) -> None:
        async with self._updated(label):
            await self._call("collective_rpc", "reload_weights", kwargs={"weights_path": str(folder.absolute())})

    async def transfer(self, source: WeightSource, label: str) -> None:
        assert self.options.transfer is not None
        self._sender = self._sender or Sender(self.name, self.options.transfer, self._call_transfer)
        async with self._updated(label):
            try:
                await self._sender.send(source)
            except BaseException:
                self._sender = None
                raise

    async def _call_transfer(self, method: str, argument: Any = None) -> None:
        base = _import("vllm.distributed.weight_transfer.base")
        if argument is None:
            await self._call(method)
        elif method == "update_weights":
            await self._call(method, base.WeightTransferUpdateRequest(argument))
        else:
            await self._call(method, base.WeightTransferInitRequest(argument))

    @asynccontextmanager
    async def _updated(self, label: str) -> AsyncIterator[None]:
        """For as long as new weights take: requests wait where they are, and no prefix is kept."""
        await self._call("pause_generation", mode="keep", clear_cache=True)
        try:
            yield
            await self._call("collective_rpc", "repack_heads")
            await self._call("update_weight_version", label)
        except BaseException:
            with anyio.move_on_after(RESUME_S, shield=True), contextlib.suppress(ProtegeError, Transient):
                await self._call("resume_generation")
            raise
        await self._call("resume_generation")

    async def load_adapter(self, folder: Path, name: str) -> None:
        adapter = _import("vllm.lora.request").LoRARequest(name, next(self._adapter_ids), str(folder.absolute()))
        await self._call("add_lora", adapter)
        self._adapters[name] = adapter

    async def drop_adapter(self, name: str) -> None:
        await self._call("remove_lora", self._adapters.pop(name).lora_int_id)

    async def has_adapter(self, name: str) -> bool:
        return name in self._adapters

    async def sleep(self) -> None:
        async with self._power:
            if self._llm is not None and self.options.sleeps and not self._asleep:
                await self._call("sleep", level=1)  # weights to the host's memory, keys and values away
                self._asleep = True

    async def wake(self) -> None:
        async with self._power:
            if self._asleep:
                _leave_device_memory()
                await self._call("wake_up")
                self._asleep = False

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Of the engine. Raises `Unreachable`, `ProtegeError`."""
        try:
            call = asyncio.ensure_future(getattr(self._llm, method)(*args, **kwargs))
            try:
                while not (await asyncio.wait([call], timeout=LOOK_S))[0]:
                    if self._llm.errored:  # vLLM lets such a call wait for ever
                        raise self._llm.dead_error
                return call.result()
            finally:
                call.cancel()
        except Exception as error:
            self._raise_if_dead(error)
            raise ProtegeError(f"{self.name}: {method} failed: {error}") from error

    def _raise_if_dead(self, error: Exception) -> None:
        if self._llm is None or self._llm.errored:
            raise Unreachable(f"{self.name} has died; its own messages are above") from error


def _leave_device_memory() -> None:
    """What torch keeps of memory that nothing here uses any more. The engine is another process, which cannot take it:
    after a step it may be all that the engine gave back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _start(arguments: dict[str, Any], brood: Brood) -> Any:
    """In a thread: it takes a while."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "weight_transfer_config" in arguments:  # its calls to its own worker hold more than plain data
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    with _sigint_blocked(), brood.hatching():
        engine_args = _import("vllm.engine.arg_utils").AsyncEngineArgs(**arguments)
        return _import("vllm.v1.engine.async_llm").AsyncLLM.from_engine_args(engine_args)


def _import(name: str) -> Any:
    """Not at the top: the rest of Protege runs without vLLM."""
    return importlib.import_module(name)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Processes that this thread starts never see Ctrl-C, which the run still needs its engine after."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _of_output(name: str, output: Any) -> Answer:
    if output is None:
        raise Transient(f"{name} gave no answer")
    (found,) = output.outputs
    ids = list(found.token_ids)
    steps = found.logprobs or []
    logprobs = [step[token].logprob for step, token in zip(steps, ids, strict=False) if token in step]
    labels = tuple(span.version for span in found.weight_versions or ())
    return checked_answer(name, ids, logprobs, found.finish_reason, labels)
