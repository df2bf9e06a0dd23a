"""Doubles of vLLM: engines that do what a test tells them, and a server that answers by script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import torch

from envs.types import SamplingParams
from models.types import WeightSource
from models.vllm.engine import Answer, Unreachable


@dataclass
class Weights:
    """`WeightSource` whose every logprob is `value`."""

    value: float = -1.0
    has_adapter: bool = False
    saved: list[str] = field(default_factory=list)
    error: Exception | None = None

    def _save(self, kind: str, folder: Path) -> None:
        if self.error is not None:
            raise self.error
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "value").write_text(str(self.value))
        self.saved.append(kind)

    def save(self, folder: Path) -> None:
        self._save("whole", folder)

    def save_base(self, folder: Path) -> None:
        self._save("base", folder)

    def save_adapter(self, folder: Path) -> None:
        self._save("adapter", folder)

    def tensors(self) -> dict[str, torch.Tensor]:
        if self.error is not None:
            raise self.error
        self.saved.append("tensors")
        return {"value": torch.tensor(self.value)}

    def logprobs(self, token_ids: Sequence[int], temperature: float) -> list[float]:
        return [self.value] * (len(token_ids) - 1)


@dataclass(eq=False)
class ScriptedEngine:
    """Answers with as many tokens as are allowed, each as likely as the weights say that it was last given."""

    name: str = "engine"
    takes_adapters: bool = False
    takes_tensors: bool = False
    started: bool = True
    deaf: bool = False  # it says that it took the weights, and goes on with the old ones
    down: bool = False
    failures: list[Exception] = field(default_factory=list)  # of the next requests
    delay_s: float = 0.0
    calls: list[str] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)
    value: float = -1.0
    current: str = "default"
    adapters: dict[str, float] = field(default_factory=dict)

    def _check(self) -> None:
        if self.down:
            raise Unreachable(f"{self.name} is gone")

    async def open(self) -> None:
        self.calls.append("open")

    async def close(self) -> None:
        self.calls.append("close")

    async def start(self, model: Path, label: str) -> None:
        self.started, self.current = True, label
        self.calls.append("start")

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str | None) -> Answer:
        self._check()
        self.asked.append(list(prompt_ids))
        if self.failures:
            raise self.failures.pop(0)
        await anyio.sleep(self.delay_s)
        self._check()
        value = self.value if adapter is None else self.adapters[adapter]
        ids = list(range(7, 7 + params.max_tokens))
        return Answer(ids, [value] * len(ids), False, (self.current,))

    async def check_alive(self) -> None:
        self._check()

    async def label(self) -> str:
        return self.current

    async def reload(self, folder: Path, label: str) -> None:
        self._check()
        self.calls.append("reload")
        self.current = label
        if not self.deaf:
            self.value = float((folder / "value").read_text())

    async def transfer(self, source: WeightSource, label: str) -> None:
        self._check()
        self.calls.append("transfer")
        value = float(source.tensors()["value"])
        self.current = label
        if not self.deaf:
            self.value = value

    async def load_adapter(self, folder: Path, name: str) -> None:
        self.calls.append("load")
        self.adapters[name] = self.value if self.deaf else float((folder / "value").read_text())

    async def drop_adapter(self, name: str) -> None:
        del self.adapters[name]

    async def has_adapter(self, name: str) -> bool:
        return name in self.adapters

    async def sleep(self) -> None:
        self.calls.append("sleep")

    async def wake(self) -> None:
        self.calls.append("wake")


Reply = Callable[[str, dict[str, Any]], Any]
"""(path, body) -> (status, JSON value or text), or None to say nothing at all."""


@dataclass
class ScriptedServer:
    url: str
    paths: list[str]
    gone: asyncio.Event  # a client left before its answer


@asynccontextmanager
async def scripted_server(reply: Reply, *, healthy: bool = True) -> AsyncIterator[ScriptedServer]:
    paths: list[str] = []
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                path = head.split()[1].decode()
                length = next((int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if b"content-length" in x), 0)
                body = json.loads(await reader.readexactly(length) or b"{}")
                if path == "/health" and healthy:
                    answer: Any = (200, "")
                else:
                    paths.append(path)
                    answer = reply(path, body)
                if answer is None:
                    await reader.read()  # until the client has had enough
                    gone.set()
                    return
                status, value = answer
                text = (value if isinstance(value, str) else json.dumps(value)).encode()
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(text), text))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield ScriptedServer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", paths, gone)
    finally:
        server.close()


def generated(ids: Sequence[int], *, logprob: float = -1.0, label: str = "default") -> dict[str, Any]:
    """An answer of the token-in-token-out endpoint."""
    content = [{"token_id": token, "logprob": logprob, "top_logprobs": []} for token in ids]
    return {
        "choices": [
            {
                "token_ids": list(ids),
                "finish_reason": "length",
                "logprobs": {"content": content},
                "weight_versions": [{"version": label, "start": 0, "end": len(ids)}],
            }
        ]
    }
