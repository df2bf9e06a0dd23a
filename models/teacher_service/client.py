"""A `Scorer` whose teacher is a `python -m recipes.serve_teacher` somewhere else."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import anyio
import anyio.to_thread
import numpy as np
import torch
from httpx2 import AsyncClient

from errors import ConfigError, TeacherError
from models.device_thread import compute
from models.heads import AtTemperature, LinearHead, from_raw
from models.teacher_service import head_cache
from models.teacher_service.connection import Answer, Connection, sentence
from models.teacher_service.fit import find_model
from models.teacher_service.messages import (
    SERVICE,
    HeadFields,
    HiddenDtype,
    RequestFields,
    ScoreRequest,
    ServiceInfo,
    answer_bytes,
    decode_answer,
    decode_head,
    encode_request,
    parse_info,
)
from models.teacher_service.pieces import Piece, cut, join
from models.teacher_service.wire import OVERHEAD_BYTES, VERSION, Refused
from models.teacher_view import exchanged
from models.types import Signal, SignalKind, SignalSpec, TeacherTopK, TeacherView

INFO_BYTES = 1 << 20
REQUEST_TOKENS = 8192  # of one request: some are on their way while others are scored
HEAD_PIECE_BYTES = 16 << 20
T = TypeVar("T")


async def describe(url: str, token: str | None = None, *, wait_s: float = 10.0) -> ServiceInfo | None:
    """What the service at `url` says of itself; None if something else answers there, such as `vllm serve`.

    A service that is still starting is waited for. Raises `ConfigError` for a token that is refused and for another
    version, `TeacherError` where nothing answers."""
    connection = Connection(url, token, wait_s=wait_s, deadline_s=wait_s + 20)
    async with connection.open() as client:
        answer = await connection.ask(client, "GET", "/info", max_bytes=INFO_BYTES)
    if not answer.ours:
        return None
    if answer.status in (401, 403):
        raise ConfigError(f"{url} is a Protege teacher and refuses: {sentence(answer.body)}")
    try:
        says = json.loads(bytes(answer.body))
        if says["service"] != SERVICE or says["version"] != VERSION:
            raise ConfigError(
                f"{url} is {says['service']} version {says['version']}, this side is {SERVICE} version {VERSION}: "
                "install the same Protege on both"
            )
        return parse_info(bytes(answer.body))
    except (ValueError, KeyError, TypeError, Refused) as error:
        raise TeacherError(f"{url} says of itself what cannot be understood: {sentence(answer.body)}") from error


class RemoteScorer:
    """`Scorer` on a model of a service. Signals of kind FULL bring the teacher's hidden states, `hidden_dtype` wide,
    and one head for all of them, fetched once, which computes on `device`.

    The service must answer with the weights that `model` was described with, and with those that answered first.
    """

    def __init__(
        self,
        name: str,
        url: str,
        service: ServiceInfo,
        model: str,
        *,
        temperature: float = 1.0,
        token: str | None = None,
        hidden_dtype: HiddenDtype = "bfloat16",
        device: torch.device | str = "cpu",
        concurrency: int = 4,
        wait_s: float = 120.0,
        deadline_s: float = 900.0,
    ) -> None:
        self.name = name
        self.temperature = temperature
        self.model = find_model(service, model, url)
        self._limits = service.limits
        self._connection = Connection(url, token, wait_s=wait_s, deadline_s=deadline_s)
        self._hidden_dtype: HiddenDtype = hidden_dtype
        self._device = torch.device(device)
        self._free = anyio.Semaphore(concurrency)
        self._head_lock = anyio.Lock()
        self._head: AtTemperature | None = None
        self._head_digest: str | None = None
        self._loaded: str | None = None  # what the first answer said of the weights that computed it

    async def score(self, views: Sequence[TeacherView], need: SignalSpec) -> list[Signal]:
        """One signal per view, in order. Raises `TeacherError`.

        On the event loop's thread it only waits: what is sent and received is put together elsewhere."""
        if need is SignalKind.NONE:
            raise TeacherError(f"teacher {self.name} was asked for nothing")
        if not views:
            return []
        fields = self._fields(need)
        requests = await anyio.to_thread.run_sync(self._requests, views, fields)
        async with self._connection.open() as client:
            if need is SignalKind.FULL:
                await self._fetch_head(client)

            async def one(pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
                async with self._free:
                    return await self._score_request(client, pieces, fields)

            answers = await _all([lambda pieces=pieces: one(pieces) for pieces in requests])
        rows = await anyio.to_thread.run_sync(join, views, requests, answers)
        return await compute(self._signals, views, rows)

    def _fields(self, need: SignalSpec) -> RequestFields:
        common = {"model": self.model.name, "weights": self.model.weights, "temperature": float(self.temperature)}
        if isinstance(need, TeacherTopK):
            return RequestFields(need="topk", k=min(need.k, self.model.vocab_size), **common)  # type: ignore[arg-type]
        if need is SignalKind.FULL:
            return RequestFields(need="full", hidden_dtype=self._hidden_dtype, **common)  # type: ignore[arg-type]
        return RequestFields(need="sampled", **common)  # type: ignore[arg-type]

    def _requests(self, views: Sequence[TeacherView], fields: RequestFields) -> list[list[Piece]]:
        """Raises `TeacherError` where not even one position's answer fits."""
        size, most = self._answer_bytes(fields, 1), self._limits.answer_bytes
        if size > most:
            raise TeacherError(
                f"teacher {self.name}: the answer to one position has {size} bytes, {self._connection.url} gives {most}"
            )
        return cut(views, tokens=min(REQUEST_TOKENS, self._limits.request_tokens), scored=most // size)

    def _answer_bytes(self, fields: RequestFields, scored: int) -> int:
        model = self.model
        return answer_bytes(fields, scored, hidden_size=model.hidden_size, vocab_size=model.vocab_size)

    async def _score_request(
        self, client: AsyncClient, pieces: Sequence[Piece], fields: RequestFields
    ) -> dict[str, np.ndarray]:
        request, model = ScoreRequest(fields, [piece.reading for piece in pieces]), self.model
        answer = await self._connection.ask(
            client,
            "POST",
            "/score",
            content=await anyio.to_thread.run_sync(encode_request, request),
            max_bytes=OVERHEAD_BYTES + 64 * 3 + self._answer_bytes(fields, request.scored),
        )
        found = await self._understood(
            answer,
            lambda body: decode_answer(body, request, hidden_size=model.hidden_size, vocab_size=model.vocab_size),
        )
        self._check_weights(found.fields.weights, found.fields.loaded)
        if fields.need == "full" and found.fields.head != self._head_digest:
            raise TeacherError(f"teacher {self.name}: the hidden states belong to another head than the one fetched")
        return found.arrays

    def _signals(self, views: Sequence[TeacherView], rows: Sequence[Mapping[str, np.ndarray]]) -> list[Signal]:
        try:
            return [self._signal(view, arrays) for view, arrays in zip(views, rows, strict=True)]
        except ValueError as error:
            raise TeacherError(f"teacher {self.name} gave a signal that is none: {error}") from error

    def _signal(self, view: TeacherView, arrays: Mapping[str, np.ndarray]) -> Signal:
        values = {name: from_raw(array) for name, array in arrays.items()}
        if "hidden" in values:
            return Signal(hidden=values["hidden"], head=self._head, swap=view.swap)
        ids = values.get("topk_ids")
        return Signal(
            logprobs=values["logprobs"],
            topk_ids=None if ids is None else exchanged(ids.long(), view.swap),
            topk_logprobs=values.get("topk_logprobs"),
            swap=view.swap,
        )

    # --- the head

    async def why_not_whole(self) -> str | None:
        """Why the model gives no whole distributions; None if it does. Raises `TeacherError`."""
        async with self._connection.open() as client:
            answer = await self._ask_head(client, 0, 0)
            if answer.status == 422:
                return sentence(answer.body)
            await self._read_head(answer, 0)
        return None

    async def _fetch_head(self, client: AsyncClient) -> None:
        """Once: from the cache if it is there, else in pieces."""
        async with self._head_lock:
            if self._head is None:
                fields, _ = await self._head_piece(client, 0, 0)
                head = await anyio.to_thread.run_sync(head_cache.load_cached, fields.digest)
                if head is None:
                    head = await self._download(client, fields)
                    if await anyio.to_thread.run_sync(head.digest) != fields.digest:
                        raise TeacherError(f"teacher {self.name}: its head did not arrive as it was sent")
                    await anyio.to_thread.run_sync(head_cache.keep, head, fields.digest)
                moved = await compute(head.to, self._device)
                self._head, self._head_digest = AtTemperature(moved, self.temperature), fields.digest

    async def _download(self, client: AsyncClient, fields: HeadFields) -> LinearHead:
        dtype = np.dtype(np.uint16 if fields.dtype == "bfloat16" else np.float32)
        weight = np.empty((fields.rows, fields.width), dtype)
        bias = np.empty(fields.rows, dtype) if fields.has_bias else None

        def keep(start: int, arrays: Mapping[str, np.ndarray]) -> None:
            for whole, name in ((weight, "weight"), (bias, "bias")):
                if whole is not None:
                    whole[start : start + len(arrays[name])] = arrays[name]

        step = max(1, min(HEAD_PIECE_BYTES, self._limits.answer_bytes) // ((fields.width + 1) * dtype.itemsize))
        for start in range(0, fields.rows, step):
            piece, arrays = await self._head_piece(client, start, min(step, fields.rows - start))
            if piece != fields:
                raise TeacherError(f"teacher {self.name}: its head changed while it was fetched")
            await anyio.to_thread.run_sync(keep, start, arrays)
        return LinearHead(from_raw(weight), None if bias is None else from_raw(bias), fields.scale, fields.softcap)

    async def _head_piece(self, client: AsyncClient, start: int, rows: int) -> tuple[HeadFields, dict[str, np.ndarray]]:
        return await self._read_head(await self._ask_head(client, start, rows), rows)

    async def _ask_head(self, client: AsyncClient, start: int, rows: int) -> Answer:
        params = {"model": self.model.name, "weights": self.model.weights, "start": str(start), "rows": str(rows)}
        size = OVERHEAD_BYTES + 64 * 2 + self._head_bytes(rows)
        return await self._connection.ask(client, "GET", "/head", params=params, max_bytes=size)

    async def _read_head(self, answer: Answer, rows: int) -> tuple[HeadFields, dict[str, np.ndarray]]:
        size = self._head_bytes(rows)
        fields, arrays = await self._understood(answer, lambda body: decode_head(body, rows=rows, max_bytes=size))
        self._check_weights(fields.weights, fields.loaded)
        expected = self.model.vocab_size, self.model.hidden_size
        if fields.width != expected[1] or not 0 < fields.rows <= 2 * expected[0]:  # some are padded
            raise TeacherError(f"teacher {self.name}: its head is {fields.rows} x {fields.width}, not {expected}")
        return fields, arrays

    def _head_bytes(self, rows: int) -> int:
        """The most that so many rows hold."""
        return 4 * rows * (self.model.hidden_size + 1)

    # --- what comes back

    async def _understood(self, answer: Answer, decode: Callable[[bytearray], T]) -> T:
        if answer.status != 200:
            raise TeacherError(f"teacher {self.name} at {self._connection.url}: {sentence(answer.body)}")
        try:
            return await anyio.to_thread.run_sync(decode, answer.body)
        except Refused as error:
            raise TeacherError(
                f"teacher {self.name} at {self._connection.url} gave no valid answer: {error}"
            ) from error

    def _check_weights(self, weights: str, loaded: str) -> None:
        self._loaded = self._loaded or loaded
        if weights != self.model.weights or loaded != self._loaded:
            raise TeacherError(
                f"teacher {self.name}: the weights behind {self._connection.url} have changed since this run began. "
                "Serve the old ones again, or start a new run"
            )


async def _all(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Results in order. The first error cancels the rest and is raised as it is, not in a group."""
    found: dict[int, T] = {}
    failed: list[TeacherError] = []

    async def one(i: int, call: Callable[[], Awaitable[T]]) -> None:
        try:
            found[i] = await call()
        except TeacherError as error:
            failed.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for i, call in enumerate(calls):
            tasks.start_soon(one, i, call)
    if failed:
        raise failed[0]
    return [found[i] for i in range(len(calls))]
