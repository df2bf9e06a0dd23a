"""The service: FastAPI routes over a queue of scoring work.

    GET /health    200, to anybody
    GET /info      models, fingerprints and limits, as JSON
    GET /metrics   Prometheus' text format
    POST /score    sequences in, log-probabilities or hidden states out
    GET /head      some rows of a model's language-model head

All but /health want the token. A refusal is a status and one sentence; what a failure says of this machine (paths,
libraries) goes to the log alone.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import torch

from errors import ConfigError, ProtegeError
from models.device_thread import compute
from models.heads import raw
from models.teacher_service.gate import GONE, Gate, read_body, send_body, send_refusal, unless_disconnected
from models.teacher_service.hosting import ServedModel, head_of
from models.teacher_service.messages import (
    AnswerFields,
    HeadFields,
    Limits,
    RequestFields,
    ScoreAnswer,
    ScoreRequest,
    ServiceInfo,
    answer_bytes,
    decode_request,
    encode_answer,
    encode_head,
    request_bytes,
)
from models.teacher_service.metrics import MEDIA_TYPE as METRICS_TYPE
from models.teacher_service.metrics import Metrics
from models.teacher_service.queueing import ScoreQueue
from models.teacher_service.wire import OVERHEAD_BYTES, Refused
from models.types import TeacherView

logger = logging.getLogger(__name__)
PATHS = ("/health", "/info", "/metrics", "/head", "/score")


@dataclass(frozen=True)
class ServiceLimits:
    """What the service lets one client, and all of them together, take up."""

    request_tokens: int = 65_536  # of one request; a longer context than this raises it
    answer_bytes: int = 64 << 20
    held_bytes: int = 4 << 30  # of all answers that are waited for, computed or being sent
    top_k: int = 1024
    waiting_requests: int = 256
    waiting_tokens: int = 1 << 20
    batch_tokens: int = 32_768  # of requests that are scored in one call
    connections: int = 256  # at a time; further ones are told to come back later
    head_timeout_s: float = 10.0  # for a request's first lines, from when the connection is there
    read_timeout_s: float = 60.0  # for a request's body
    write_timeout_s: float = 60.0  # for each MiB of an answer


class Service:
    """Models, their queue, and the ASGI `app` in front of them."""

    def __init__(
        self, models: Sequence[ServedModel], *, token: str | None, limits: ServiceLimits | None = None
    ) -> None:
        self._models = {model.info.name: model for model in models}
        self.limits = limits or ServiceLimits()
        contexts = [model.info.context_length or 0 for model in models]
        self._request_tokens = max(self.limits.request_tokens, *contexts)
        self._held_bytes = 0
        self._metrics = Metrics()
        self.queue = ScoreQueue(
            self._score_batch,
            max_jobs=self.limits.waiting_requests,
            max_tokens=self.limits.waiting_tokens,
            batch_tokens=self.limits.batch_tokens,
        )
        self.app = Gate(self._routes(), token=token, answered=self._count)

    @property
    def info(self) -> ServiceInfo:
        limits = Limits(
            request_tokens=self._request_tokens, answer_bytes=self.limits.answer_bytes, top_k=self.limits.top_k
        )
        return ServiceInfo(models=tuple(model.info for model in self._models.values()), limits=limits)

    def _count(self, path: str, status: int) -> None:
        self._metrics.add("requests", path=path if path in PATHS else "other", status=str(status))

    def _routes(self) -> Any:
        try:
            from fastapi import FastAPI  # pyright: ignore[reportMissingImports]
            from fastapi.responses import JSONResponse, PlainTextResponse, Response  # pyright: ignore
            from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("serving teachers needs FastAPI and uvicorn: pip install 'protege[serve]'") from error

        async def health(request: Any) -> Any:
            return JSONResponse({"status": "ok"})

        async def info(request: Any) -> Any:
            return Response(self.info.model_dump_json(), media_type="application/json")

        async def metrics(request: Any) -> Any:
            return PlainTextResponse(self.metrics_text(), media_type=METRICS_TYPE)

        async def unknown(request: Any, error: HTTPException) -> Any:
            words = {404: "there is no such path", 405: "this path takes another method"}
            return _Refusal(Refused(error.status_code, words.get(error.status_code, "the request was refused")))

        async def refused(request: Any, error: Refused) -> Any:
            if error.status == GONE:
                self._metrics.add("abandoned")
            return _Refusal(error)

        async def failed(request: Any, error: Exception) -> Any:
            logger.error("%s failed: %s", request.url.path, error)
            return _Refusal(Refused(500, "the service could not do this; its log says why"))

        handlers = {HTTPException: unknown, Refused: refused, ProtegeError: failed, Exception: failed}
        app = FastAPI(
            docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan, exception_handlers=handlers
        )
        routes: dict[str, Any] = {"/health": health, "/info": info, "/metrics": metrics, "/head": self._give_head}
        for path, endpoint in routes.items():
            app.add_route(path, endpoint, methods=["GET"])
        give_scores: Any = self._give_scores
        app.add_route("/score", give_scores, methods=["POST"])
        return app

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.queue.work)
            yield
            tasks.cancel_scope.cancel()

    # --- scoring

    async def _give_scores(self, request: Any) -> _Answer:
        limit = OVERHEAD_BYTES + request_bytes(self._request_tokens)
        body = await read_body(request, max_bytes=limit, timeout_s=self.limits.read_timeout_s)
        asked, model = await anyio.to_thread.run_sync(self._understood, body)

        async def make() -> bytes:
            body = await unless_disconnected(request.receive, self._scores(asked, model))
            if body is None:
                raise Refused(GONE, "the client is gone")
            self._metrics.add("scored_tokens", asked.scored, model=model.info.name, need=asked.fields.need)
            self._metrics.add("answer_bytes", len(body))
            return body

        return await self._answered(_size(asked, model), make)

    async def _answered(self, size: int, make: Callable[[], Awaitable[bytes]]) -> _Answer:
        """An answer of about `size` bytes, for which there is room until it is sent. Raises `Refused`."""
        release = self._hold(size)
        try:
            return _Answer(await make(), self.limits.write_timeout_s, release)
        except BaseException:
            release()
            raise

    def _hold(self, size: int) -> Callable[[], None]:
        """Room for an answer, until what is returned is called. A single answer always has some. Raises `Refused`."""
        if self._held_bytes and self._held_bytes + size > self.limits.held_bytes:
            raise Refused(503, f"answers of {self._held_bytes} bytes are made or sent already", retry_after_s=2)
        self._held_bytes += size

        def release() -> None:
            self._held_bytes -= size

        return release

    def _understood(self, body: bytearray) -> tuple[ScoreRequest, ServedModel]:
        """Raises `Refused`."""
        asked = decode_request(body, max_tokens=self._request_tokens)
        model = self._find(asked.fields.model, asked.fields.weights)
        self._check(asked, model)
        return asked, model

    async def _scores(self, asked: ScoreRequest, model: ServedModel) -> bytes:
        loaded, head = await model.checkpoint.loaded(model.info.name), None
        if asked.fields.need == "full":
            _, head = await head_of(model)
        views = [TeacherView(reading.ids, reading.positions, reading.positions) for reading in asked.readings]
        found = await self.queue.submit(_key(asked.fields), views)
        fields = AnswerFields(model=model.info.name, weights=model.info.weights, loaded=loaded.digest, head=head)
        return await anyio.to_thread.run_sync(_encoded, fields, found)

    def _find(self, name: str, weights: str | None) -> ServedModel:
        model = self._models.get(name)
        if model is None:
            raise Refused(404, f"there is no model {name[:100]!r} here, there are {', '.join(self._models)}")
        if weights is not None and weights != model.info.weights:
            raise Refused(409, f"model {name} has other weights than the request is for: {model.info.weights}")
        return model

    def _check(self, asked: ScoreRequest, model: ServedModel) -> None:
        info, fields = model.info, asked.fields
        low, high = self.info.limits.temperature
        if not low <= fields.temperature <= high:
            raise Refused(422, f"temperature {fields.temperature} is outside {low} to {high}")
        if fields.k is not None and fields.k > self.limits.top_k:
            raise Refused(422, f"k={fields.k} is more than the {self.limits.top_k} that this service gives")
        for reading in asked.readings:
            if info.context_length is not None and len(reading.ids) > info.context_length:
                raise Refused(422, f"a view has {len(reading.ids)} tokens, {info.name} reads {info.context_length}")
            if not 0 <= (id_ := _strangest(reading.ids)) < info.vocab_size:
                raise Refused(422, f"model {info.name} has no token {id_}: its ids end at {info.vocab_size - 1}")
        if (size := _size(asked, model)) > self.limits.answer_bytes:
            raise Refused(413, f"the answer would have {size} bytes, at most {self.limits.answer_bytes} are given")

    async def _score_batch(self, key: Any, views: Sequence[TeacherView]) -> list[dict[str, np.ndarray]]:
        loaded = await self._models[key.model].checkpoint.loaded(key.model)
        self._metrics.add("batches")
        started = time.monotonic()
        answers = await loaded.score(views, key)
        self._metrics.add("busy_seconds", time.monotonic() - started)
        self._metrics.add("read_tokens", sum(len(view.token_ids) for view in views), model=key.model)
        return answers

    # --- heads

    async def _give_head(self, request: Any) -> _Answer:
        query = request.query_params
        model = self._find(query.get("model", ""), query.get("weights"))
        loaded = await model.checkpoint.loaded(model.info.name)
        head, digest = await head_of(model)
        rows, width = head.weight.shape
        start, count = (_whole_number(name, query.get(name, "0")) for name in ("start", "rows"))
        end = start + count
        if end > rows:
            raise Refused(422, f"rows {start} to {end} were asked for, the head has {rows}")
        size = count * (width + 1) * head.weight.element_size()
        if size > self.limits.answer_bytes:
            raise Refused(413, f"{count} rows are more than the {self.limits.answer_bytes} bytes given at a time")
        fields = HeadFields(
            model=model.info.name,
            weights=model.info.weights,
            loaded=loaded.digest,
            digest=digest,
            rows=rows,
            width=width,
            dtype="bfloat16" if head.weight.dtype == torch.bfloat16 else "float32",
            has_bias=head.bias is not None,
            scale=float(head.scale),
            softcap=head.softcap,
        )

        async def make() -> bytes:
            weight = await compute(lambda: raw(head.weight[start:end]))
            bias = None if head.bias is None else await compute(raw, head.bias[start:end])
            return await anyio.to_thread.run_sync(encode_head, fields, weight, bias)

        return await self._answered(size, make)

    def metrics_text(self) -> str:
        """As Prometheus reads it."""
        loaded = {(("model", name),): float(m.checkpoint.in_memory) for name, m in self._models.items()}
        waiting = {"queue_requests": {(): self.queue.jobs}, "queue_tokens": {(): self.queue.tokens}}
        return self._metrics.text({**waiting, "loaded": loaded})


class _Answer:
    """A response of bytes, as Starlette calls it. `release` is called once they are sent, or are not wanted."""

    def __init__(self, body: bytes, timeout_s: float, release: Callable[[], None]) -> None:
        self._body = body
        self._timeout_s = timeout_s
        self._release = release

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send_body(self._body, send, timeout_s=self._timeout_s)
        except TimeoutError:  # returning with the body unfinished makes uvicorn close the connection
            logger.warning("a client took longer than %g s for a MiB of its answer", self._timeout_s)
        finally:
            self._release()


class _Refusal:
    """A response of one sentence, as Starlette calls it."""

    def __init__(self, refusal: Refused) -> None:
        self._refusal = refusal

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send_refusal(self._refusal, send)


def _key(fields: RequestFields) -> RequestFields:
    """What is computed: hidden states know no temperature."""
    return fields.model_copy(update={"temperature": 1.0}) if fields.need == "full" else fields


def _size(asked: ScoreRequest, model: ServedModel) -> int:
    """Of the answer's arrays, in bytes."""
    info = model.info
    return answer_bytes(asked.fields, asked.scored, hidden_size=info.hidden_size, vocab_size=info.vocab_size)


def _encoded(fields: AnswerFields, found: Sequence[dict[str, np.ndarray]]) -> bytes:
    arrays = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    return encode_answer(ScoreAnswer(fields, arrays))


def _strangest(ids: np.ndarray) -> int:
    """The id that is least likely to be in a vocabulary."""
    return int(ids.min()) if ids.min() < 0 else int(ids.max())


def _whole_number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise Refused(400, f"{name} is no whole number")
    return int(text)
