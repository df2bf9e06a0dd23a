"""A server started with `vllm serve`: token ids over HTTP by vLLM's token-in-token-out endpoint.

That endpoint takes vLLM's own sampling parameters, adds no text, no default of the model's and no rounding, and says
which weights drew the tokens. `/v1/completions` does the same by detours, and does not say it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import httpx2

from envs.types import SamplingParams
from errors import ProtegeError, SamplerError
from models import http_clients
from models.types import WeightSource
from models.vllm.engine import Answer, Outdated, Transient, Unreachable, read_answer, sampling_params
from models.vllm.transfer import BACKENDS, Sender

T = TypeVar("T")
CONNECT_S = 10.0
CONTROL_S = 30.0  # of a request that computes nothing
UPDATE_S = 1800.0  # of a request that takes new weights
WORKERS_ANSWER = ("/collective_rpc", "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine",
                  "/start_weight_update", "/update_weights", "/finish_weight_update")  # fmt: skip
"""500 from these is what a worker says, and no reason to ask again."""
LOOK_S = 10.0  # between two looks at a server that takes new weights
RESUME_PAUSES_S = (0.2, 1.0)  # after the first and the second try


class ServerEngine:
    """`Engine` behind a URL. How long a turn may take is its caller's to say. The token is sent, and never shown."""

    def __init__(
        self,
        url: str,
        *,
        takes_adapters: bool = False,
        repacks: bool = False,
        token: str | None = None,
        transfer: str | None = None,
    ) -> None:
        """`transfer`: of `BACKENDS`, how tensors are handed over; None: in a folder."""
        self.name = url.rstrip("/")
        self._transfer = transfer
        self._sender: Sender | None = None
        self._sent = ""  # label of the last weights that it has sent
        self._repacks = repacks  # has our worker extension
        self.takes_adapters = takes_adapters
        self._headers = http_clients.token_header(token)
        self._client: httpx2.AsyncClient | None = None

    @property
    def takes_tensors(self) -> bool:
        return self._transfer is not None

    async def open(self) -> None:
        # Servers close what has been idle for five seconds: a request must not be on its way then.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        self._client = httpx2.AsyncClient(
            base_url=self.name,
            headers=self._headers,
            limits=limits,
            verify=self.name.startswith("https:"),
            trust_env=http_clients.may_use_proxy(self.name),
        )

    async def close(self) -> None:
        await self._disconnect()
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    @property
    def started(self) -> bool:
        return True

    async def start(self, model: Path, label: str) -> None:
        raise AssertionError("a server is started by its owner")

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str | None) -> Answer:
        body = {"token_ids": list(prompt_ids), "sampling_params": sampling_params(params)}
        if adapter is not None:
            body["model"] = adapter
        # Leaving the request closes its connection, and the server aborts what nobody waits for.
        answer = await self._ask("POST", "/inference/v1/generate", math.inf, json=body)
        if answer.status_code == 404 and adapter is not None:
            raise Outdated(f"{self.name} does not have the adapter {adapter}")
        if answer.status_code != 200:
            raise SamplerError(f"{self.name} refused a request: {reason_of(answer)}")
        return read_answer(self.name, _json_of(self.name, answer))

    async def check_alive(self) -> None:
        await self._ask("GET", "/health", CONTROL_S)

    async def label(self) -> str:
        answer = await self._ask("GET", "/weight_info", CONTROL_S)
        return str(_json_of(self.name, answer).get("weight_version"))

    async def reload(self, folder: Path, label: str) -> None:
        async with self._updated(label):
            rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.absolute())}}
            await self._order("/collective_rpc", timeout_s=UPDATE_S, json=rpc)

    async def transfer(self, source: WeightSource, label: str) -> None:
        assert self._transfer is not None
        async with self._updated(label):
            try:
                if self._sender is None or await self.label() != self._sent:  # none, or another one since then
                    self._sender = await self._connect(self._transfer)
                await self._while_it_lives(partial(self._sender.send, source))
                self._sent = label
            except BaseException:
                await self._disconnect()
                raise

    async def _connect(self, backend: str) -> Sender:
        await self._disconnect()
        if (await self._ask("POST", "/shutdown_weight_transfer_engine", CONTROL_S)).status_code != 200:
            # A run that was killed has left it in the midst of an update. What that had sent is replaced now.
            await self._order("/finish_weight_update", timeout_s=UPDATE_S)
            await self._order("/shutdown_weight_transfer_engine")
        meeting: dict[str, Any] = {}
        if BACKENDS[backend].meets:
            found = _json_of(self.name, await self._ask("GET", "/get_world_size", CONTROL_S))
            try:
                address, port = http_clients.own_place(self.name)
                meeting = {"master_address": address, "master_port": port, "world_size": 1 + int(found["world_size"])}
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise ProtegeError(f"{self.name} and this machine cannot meet for {backend}: {error!r}") from error
        return Sender(self.name, backend, self._call_transfer, **meeting)

    async def _disconnect(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            with anyio.CancelScope(shield=True):
                await sender.close()

    async def _call_transfer(self, method: str, argument: Any = None) -> None:
        key = {"init_weight_transfer_engine": "init_info", "update_weights": "update_info"}.get(method)
        body = {} if key is None else {"json": {key: argument}}
        await self._order(f"/{method}", timeout_s=UPDATE_S, **body)

    @asynccontextmanager
    async def _updated(self, label: str) -> AsyncIterator[None]:
        """For as long as new weights take: requests wait where they are, and no prefix is kept."""
        try:
            await self._order("/pause", params={"mode": "keep", "clear_cache": "true"})
            yield
            if self._repacks:
                await self._order("/collective_rpc", timeout_s=UPDATE_S, json={"method": "repack_heads"})
            await self._order("/update_weight_version", json={"new_version": label})
        except BaseException as error:
            with anyio.move_on_after(CONTROL_S, shield=True), contextlib.suppress(ProtegeError, Transient):
                await self._resume()
            if isinstance(error, ProtegeError):
                await self.check_alive()  # where it is dead, that is why
            raise
        await self._resume()

    async def _resume(self) -> None:
        """More than one try: a server that stays paused answers nobody."""
        for pause_s in RESUME_PAUSES_S:
            try:
                return await self._order("/resume")
            except Transient:
                await anyio.sleep(pause_s)
        await self._order("/resume")

    async def load_adapter(self, folder: Path, name: str) -> None:
        adapter = {"lora_name": name, "lora_path": str(folder.absolute())}
        await self._order("/v1/load_lora_adapter", timeout_s=UPDATE_S, json=adapter)

    async def drop_adapter(self, name: str) -> None:
        await self._order("/v1/unload_lora_adapter", json={"lora_name": name})

    async def has_adapter(self, name: str) -> bool:
        answer = await self._ask("GET", "/v1/models", CONTROL_S)
        return any(model.get("id") == name for model in _json_of(self.name, answer).get("data", []))

    async def sleep(self) -> None:
        """Its memory is its own."""

    async def wake(self) -> None: ...

    async def get(self, path: str) -> httpx2.Response:
        """For checks. Raises `Transient`."""
        return await self._ask("GET", path, CONTROL_S)

    async def post(self, path: str, body: Any) -> httpx2.Response:
        """For checks. Raises `Transient`."""
        return await self._ask("POST", path, CONTROL_S, json=body)

    async def _order(self, path: str, *, timeout_s: float = CONTROL_S, **request: Any) -> None:
        """Raises `ProtegeError` if the server does not do it."""
        ask = partial(self._ask, "POST", path, timeout_s, **request)
        answer = await (self._while_it_lives(ask) if timeout_s > CONTROL_S else ask())
        if answer.status_code != 200:
            raise ProtegeError(f"{self.name} did not take new weights: POST {path}: {reason_of(answer)}")

    async def _while_it_lives(self, work: Callable[[], Awaitable[T]]) -> T:
        """What takes long, and a look at the server now and then: of one that is frozen, or whose machine is gone,
        nothing else would tell. Raises what `work` does, and `Transient`."""
        found: list[T] = []
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:

            async def look() -> None:
                nonlocal failure
                try:
                    while True:
                        await anyio.sleep(LOOK_S)
                        await self.check_alive()
                except Transient as error:
                    failure = error
                    tasks.cancel_scope.cancel()

            tasks.start_soon(look)
            try:
                found.append(await work())
            except (ProtegeError, Transient) as error:  # as itself, not in a group
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return found[0]

    async def _ask(self, method: str, path: str, timeout_s: float, **request: Any) -> httpx2.Response:
        """Raises `Unreachable` if nothing comes back, `Transient` for a server that is not itself."""
        assert self._client is not None, "open it first"
        timeout = httpx2.Timeout(None if timeout_s == math.inf else timeout_s, connect=CONNECT_S)
        if path in WORKERS_ANSWER:  # vLLM's server breaks a connection off after an error there, and says so to nobody
            request["headers"] = {"Connection": "close"}
        try:
            with anyio.fail_after(timeout_s):  # httpx's own are of single reads
                answer = await self._client.request(method, path, timeout=timeout, **request)
        except TimeoutError as error:
            raise Unreachable(f"{self.name} did not answer within {timeout_s:.0f} s") from error
        except httpx2.TimeoutException as error:
            raise Unreachable(f"{self.name} did not answer in time ({type(error).__name__})") from error
        except httpx2.HTTPError as error:
            raise Unreachable(f"{self.name} cannot be reached ({type(error).__name__}: {error})") from error
        if answer.status_code in (429, 500, 502, 503, 504) and path not in WORKERS_ANSWER:
            raise Transient(f"{self.name} failed: {reason_of(answer)}")
        return answer


def reason_of(answer: httpx2.Response) -> str:
    """Status and message of an answer that is no success, on one line."""
    return f"{answer.status_code} {http_clients.reason_of(answer)}"


def _json_of(name: str, answer: httpx2.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError as error:
        raise SamplerError(f"{name} sent no JSON: {answer.text[:100]!r}") from error
    if not isinstance(body, dict):
        raise SamplerError(f"{name} sent no JSON object: {answer.text[:100]!r}")
    return body
