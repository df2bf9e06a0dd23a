"""The teacher service and its client through real sockets: what every scorer must do, and what is theirs alone."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import conformance
import httpx2
import numpy as np
import pytest
import tiny
import torch
from conformance import ScorerEngine
from teacher_services import TOKEN, Running, llama, running, served
from transformers import LlamaConfig, LlamaForCausalLM

from errors import ConfigError, TeacherError, TokenizerMismatchError
from models.causal_lm import CausalLM
from models.teacher_service import client, connection
from models.teacher_service.client import RemoteScorer, describe
from models.teacher_service.fit import check_fit, find_model
from models.teacher_service.hosting import ServedModel
from models.teacher_service.messages import MAX_VIEWS
from models.teacher_service.pieces import cut
from models.teacher_service.server import ServiceLimits
from models.transformers_scorer import TransformersScorer
from models.types import SignalKind, TeacherTopK, TeacherView


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTEGE_CACHE", str(tmp_path))
    return tmp_path / "heads"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(served(llama())) as service:
        yield service


class TestRemoteScorer(conformance.ScorerSuite):
    @pytest.fixture
    def engine(self, service: Running) -> ScorerEngine:
        model = tiny.model()
        return ScorerEngine(
            make=lambda temperature: service.scorer(temperature, hidden_dtype="float32"),
            vocab_size=tiny.VOCAB,
            reference=lambda prompt, answer, temperature: tiny.plain_logprobs(model, prompt, answer, temperature),
            distribution=lambda ids, temperature: tiny.plain_distribution(model, ids, temperature),
        )


def views(count: int) -> list[TeacherView]:
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, tiny.VOCAB, size=12 + i) for i in range(count)]
    return [TeacherView(x, np.arange(4, len(x)), np.arange(4, len(x))) for x in ids]


def count(service: Running, name: str, **labels: str) -> float:
    """A counter's value."""
    inside = ",".join(f'{label}="{value}"' for label, value in labels.items())
    wanted = f"protege_teacher_{name}_total" + (f"{{{inside}}} " if labels else " ")
    lines = service.service.metrics_text().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(wanted))


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not true():
            await anyio.sleep(0.01)


class Gate:
    """Holds a model's forward passes until it is opened."""

    def __init__(self) -> None:
        self._reached, self._open = threading.Event(), threading.Event()

    def close_around(self, lm: CausalLM) -> None:
        hidden = lm.hidden

        def held(sequences: Any) -> Any:
            self._reached.set()
            assert self._open.wait(30)
            return hidden(sequences)

        lm.hidden = held  # type: ignore[method-assign]

    async def reached(self) -> None:
        await until(self._reached.is_set)

    def open(self) -> None:
        self._open.set()


# --- numbers


@pytest.mark.anyio
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
async def test_heads_with_a_soft_cap_or_tied_to_the_embedding_make_the_same_logits(architecture: str):
    lm = llama(architecture=architecture)
    (view,) = views(1)
    with running(served(lm)) as service:
        (far,) = await service.scorer(0.7, hidden_dtype="float32").score([view], SignalKind.FULL)
    (near,) = await TransformersScorer("t", lm, temperature=0.7).score([view], SignalKind.FULL)
    assert far.head is not None and near.head is not None and far.hidden is not None and near.hidden is not None
    torch.testing.assert_close(far.head(far.hidden), near.head(near.hidden), atol=1e-5, rtol=0)


@pytest.mark.anyio
async def test_bfloat16_states_are_the_float32_ones_rounded(service: Running):
    some = views(3)
    exact = await service.scorer(hidden_dtype="float32").score(some, SignalKind.FULL)
    rounded = await service.scorer(hidden_dtype="bfloat16").score(some, SignalKind.FULL)
    for a, b in zip(exact, rounded, strict=True):
        assert a.hidden is not None and b.hidden is not None
        assert torch.equal(a.hidden.bfloat16(), b.hidden)


@pytest.mark.anyio
async def test_positions_may_come_in_any_order(service: Running):
    ids = np.arange(1, 20)
    odd = TeacherView(ids, np.array([7, 3, 3, 18]), np.array([0, 1, 2, 3]))
    scorer = service.scorer(hidden_dtype="float32")
    plain = TeacherView(ids, np.arange(1, 19), np.arange(1, 19))
    for need in (SignalKind.SAMPLED, TeacherTopK(3), SignalKind.FULL):
        (got,), (whole,) = [await scorer.score([view], need) for view in (odd, plain)]
        for name in ("logprobs", "topk_ids", "topk_logprobs", "hidden"):
            value, every = getattr(got, name), getattr(whole, name)
            assert value is None or torch.allclose(value.float(), every[[6, 2, 2, 17]].float(), atol=1e-5)


@pytest.mark.anyio
async def test_a_top_k_beyond_the_vocabulary_is_all_of_it(service: Running):
    (view,) = views(1)
    (signal,) = await service.scorer().score([view], TeacherTopK(10 * tiny.VOCAB))
    assert signal.topk_logprobs is not None and signal.topk_logprobs.shape[1] == tiny.VOCAB
    torch.testing.assert_close(signal.topk_logprobs.exp().sum(-1), torch.ones(len(view.positions)))


@pytest.mark.anyio
async def test_many_views_are_cut_into_requests_by_tokens_and_by_answer():
    lm = llama()
    some = [TeacherView(np.full(100, i + 1), np.arange(1, 100), np.arange(1, 100)) for i in range(8)]
    expected = await TransformersScorer("t", lm).score(some, TeacherTopK(5))
    for limits, requests in ((ServiceLimits(answer_bytes=10_000), 4), (ServiceLimits(request_tokens=512), 2)):
        with running(served(lm), limits=limits) as service:
            got = await service.scorer().score(some, TeacherTopK(5))
            assert count(service, "requests", path="/score", status="200") == requests
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.topk_logprobs, b.topk_logprobs, atol=1e-4, rtol=0)


def one_by_one(view: TeacherView) -> TeacherView:
    """The same view with its positions in another order, one of them twice."""
    order = np.random.default_rng(0).permutation(len(view.positions))
    order = np.append(order, order[0])
    return TeacherView(view.token_ids, view.positions[order], np.arange(len(order)))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("need", "row_bytes"), [(SignalKind.SAMPLED, 4), (TeacherTopK(5), 44), (SignalKind.FULL, 4 * 32)], ids=str
)
@pytest.mark.parametrize("rows", [1, 3, 11])
async def test_a_view_whose_answer_does_not_fit_is_asked_about_in_pieces(need: Any, row_bytes: int, rows: int):
    """Of 20 and 7 positions, 11 and fewer at a time: every answer fits, and the signal is that of one answer."""
    lm, head_row = llama(), 4 * 33
    ids = np.random.default_rng(1).integers(0, tiny.VOCAB, size=(2, 30))
    long = TeacherView(ids[0], np.arange(5, 25), np.arange(20))
    some = [long, one_by_one(TeacherView(ids[1], np.arange(12, 19), np.arange(7))), one_by_one(long)]
    limits = ServiceLimits(answer_bytes=max(rows * row_bytes, head_row if need is SignalKind.FULL else 0))
    with running(served(lm), limits=limits) as service:
        got = await service.scorer(hidden_dtype="float32").score(some, need)
        asked = count(service, "requests", path="/score", status="200")
        assert count(service, "scored_tokens", model="t", need=getattr(need, "value", "topk")) == 20 + 7 + 20
    held = limits.answer_bytes // row_bytes
    assert asked >= 47 / held
    for a, b in zip(got, await TransformersScorer("t", lm).score(some, need), strict=True):
        for name in ("logprobs", "topk_logprobs", "hidden"):
            value, expected = getattr(a, name), getattr(b, name)
            assert (value is None) == (expected is None)
            if value is not None:
                torch.testing.assert_close(value.float(), expected.float(), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.anyio
async def test_an_episode_of_more_than_64_mib_of_states_is_scored_with_the_limits_as_they_are():
    """8,192 states of 4,096 in bfloat16 are an answer's limit; here are 8,300 of one episode."""
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=4096, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        head_dim=8, num_key_value_heads=1, max_position_embeddings=8400,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = CausalLM.verified(LlamaForCausalLM(config))
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, size=8400)
    view = TeacherView(ids, np.arange(100, 8400), np.arange(8300))
    model = served(lm)
    model = ServedModel(model.info.model_copy(update={"context_length": 8400}), model.checkpoint)
    with running(model) as service:
        (got,) = await service.scorer().score([view], SignalKind.FULL)
        assert count(service, "requests", path="/score", status="200") == 2
    (expected,) = await TransformersScorer("t", lm).score([view], SignalKind.FULL)
    assert got.hidden is not None and expected.hidden is not None and got.hidden.dtype == torch.bfloat16
    torch.testing.assert_close(got.hidden.float(), expected.hidden.bfloat16().float(), atol=0.02, rtol=0.01)


@pytest.mark.anyio
async def test_very_many_short_views_fit_into_the_requests_that_are_taken():
    lm = llama()
    some = [TeacherView(np.array([i % tiny.VOCAB, 1]), np.array([1]), np.array([0])) for i in range(600)]
    limits = ServiceLimits(request_tokens=1)  # a context's length, 512
    with running(served(lm, token_budget=512), limits=limits) as service:
        got = await service.scorer().score(some, SignalKind.SAMPLED)
        assert count(service, "requests", path="/score", status="200") == 3
    for a, b in zip(got, await TransformersScorer("t", lm).score(some, SignalKind.SAMPLED), strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)


def test_no_request_has_more_views_than_are_taken():
    some = [TeacherView(np.array([1]), np.array([], dtype=int), np.array([], dtype=int))] * (2 * MAX_VIEWS + 1)
    assert [len(pieces) for pieces in cut(some, tokens=1 << 20, scored=9)] == [MAX_VIEWS, MAX_VIEWS, 1]


def test_a_position_that_fits_into_no_answer_is_refused_at_the_start():
    with running(served(llama()), limits=ServiceLimits(answer_bytes=100)) as service:
        model = service.info.models[0]

        def check(need: Any) -> None:
            check_fit(
                service.info, model, url="u", tokenizer="tok", tokenizer_name="./mine", need=need, temperature=1.0
            )

        check(SignalKind.SAMPLED)
        check(TeacherTopK(12))
        with pytest.raises(ConfigError, match=r"one position needs 108: lower top_k=13"):
            check(TeacherTopK(13))
        with pytest.raises(ConfigError, match="one position needs 132: use an objective"):
            check(SignalKind.FULL)
        with pytest.raises(TeacherError, match="one position has 108 bytes"):
            anyio.run(service.scorer().score, views(1), TeacherTopK(13))


# --- the event loop


@pytest.mark.anyio
@pytest.mark.parametrize("need", [SignalKind.SAMPLED, TeacherTopK(5), SignalKind.FULL], ids=str)
async def test_the_event_loop_goes_on_while_answers_are_put_together(need: Any, monkeypatch: pytest.MonkeyPatch):
    """Every piece of that work is held up until a task of the loop has run. On the loop's own thread it would never."""
    loop_thread, held = threading.get_ident(), Counter[str]()
    beats = threading.Condition()
    beat_count = 0

    def held_up(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            assert threading.get_ident() != loop_thread, f"{name} is done on the event loop's thread"
            with beats:
                now = beat_count
                assert beats.wait_for(lambda: beat_count >= now + 2, 20), f"the loop stands still during {name}"
            held[name] += 1
            return function(*arguments, **options)

        return wrapped

    for name in ("cut", "join", "encode_request", "decode_answer", "decode_head"):
        monkeypatch.setattr(client, name, held_up(name, getattr(client, name)))
    for name in ("keep", "load_cached"):
        monkeypatch.setattr(client.head_cache, name, held_up(name, getattr(client.head_cache, name)))
    monkeypatch.setattr(client, "Signal", held_up("Signal", client.Signal))

    async def beat() -> None:
        nonlocal beat_count
        while True:
            with beats:
                beat_count += 1
                beats.notify_all()
            await anyio.sleep(0.001)

    with running(served(llama())) as service:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beat)
            await service.scorer().score(views(2), need)
            tasks.cancel_scope.cancel()
    expected = {"cut", "join", "encode_request", "decode_answer", "Signal"}
    assert held.keys() == expected | ({"decode_head", "keep", "load_cached"} if need is SignalKind.FULL else set())


# --- the head


@pytest.mark.anyio
async def test_a_head_is_fetched_in_pieces_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "HEAD_PIECE_BYTES", 4 * 33 * 10)  # ten rows at a time
    with running(served(llama())) as service:
        scorer = service.scorer()
        heads = {(await scorer.score(views(2), SignalKind.FULL))[0].head for _ in range(3)}
        assert len(heads) == 1
        assert count(service, "requests", path="/head", status="200") == 1 + 7
        await service.scorer().score(views(1), SignalKind.FULL)  # another run: asks which head it is, and has it
        assert count(service, "requests", path="/head", status="200") == 1 + 7 + 1
        (kept,) = cache.iterdir()
        kept.write_bytes(kept.read_bytes()[:-3] + b"xyz")
        await service.scorer().score(views(1), SignalKind.FULL)
        assert count(service, "requests", path="/head", status="200") == 2 * (1 + 7) + 1, "a damaged file is not used"


# --- several models, several clients


@pytest.mark.anyio
async def test_two_models_and_two_clients_at_once_each_loaded_once_when_needed():
    lms, loads = {"a": llama(seed=1), "b": llama(seed=2)}, []

    def loader(name: str):
        return lambda: loads.append(name) or lms[name]

    models = [served(lm, name, weights=name, load=loader(name)) for name, lm in lms.items()]
    answers = {}
    with running(*models) as service:
        assert loads == []

        async def one(name: str, temperature: float) -> None:
            answers[name, temperature] = await service.scorer(temperature, model=name).score(
                views(3), SignalKind.SAMPLED
            )

        async with anyio.create_task_group() as tasks:
            for name in lms:
                for temperature in (0.7, 1.0):
                    tasks.start_soon(one, name, temperature)
    assert sorted(loads) == ["a", "b"]
    for (name, temperature), signals in answers.items():
        expected = await TransformersScorer(name, lms[name], temperature=temperature).score(
            views(3), SignalKind.SAMPLED
        )
        for a, b in zip(signals, expected, strict=True):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)


@pytest.mark.anyio
async def test_requests_that_wait_together_are_scored_in_one_call():
    lm, gate = llama(), Gate()
    gate.close_around(lm)
    with running(served(lm)) as service:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(service.scorer().score, views(1), SignalKind.SAMPLED)
            await gate.reached()
            for _ in range(5):
                tasks.start_soon(service.scorer().score, views(1), SignalKind.SAMPLED)
            await until(lambda: service.service.queue.jobs == 5)
            gate.open()
        assert count(service, "batches") == 2
        assert count(service, "read_tokens", model="t") == 6 * len(views(1)[0].token_ids)


@pytest.mark.anyio
async def test_a_client_that_is_sent_away_comes_back():
    lm, gate = llama(), Gate()
    gate.close_around(lm)
    with running(served(lm), limits=ServiceLimits(waiting_requests=1)) as service:
        answers = []

        async def one() -> None:
            answers.extend(await service.scorer().score(views(1), SignalKind.SAMPLED))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            await gate.reached()
            for _ in range(3):
                tasks.start_soon(one)
            await until(lambda: count(service, "requests", path="/score", status="503") >= 2)
            gate.open()
        assert len(answers) == 4


@pytest.mark.anyio
async def test_a_client_that_goes_away_frees_its_work():
    lm, gate = llama(), Gate()
    gate.close_around(lm)
    with running(served(lm)) as service:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(service.scorer().score, views(1), SignalKind.SAMPLED)
            await gate.reached()
            with anyio.move_on_after(0.3):  # the connection is closed with it
                await service.scorer().score(views(2), SignalKind.SAMPLED)
            await until(lambda: service.service.queue.jobs == 0 and count(service, "abandoned") == 1)
            gate.open()
        assert count(service, "read_tokens", model="t") == len(views(1)[0].token_ids)


@pytest.mark.anyio
async def test_a_batch_whose_clients_have_all_gone_away_is_not_read_to_its_end():
    lm, gate, reads = llama(), Gate(), []
    hidden = lm.hidden
    lm.hidden = lambda sequences: reads.append(len(sequences)) or hidden(sequences)  # type: ignore[method-assign,assignment]
    gate.close_around(lm)
    with running(served(lm)) as service:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(service.scorer().score, views(12), SignalKind.SAMPLED)  # one pack each
            await gate.reached()
            tasks.cancel_scope.cancel()
        await until(lambda: count(service, "abandoned") == 1)
        gate.open()
        await service.scorer().score(views(1), SignalKind.SAMPLED)
    assert len(reads) == 2, "the view that was being read, and the one that was asked for later"


# --- what goes wrong on the way


@pytest.mark.anyio
async def test_a_service_that_restarts_is_waited_for():
    lm, gate = llama(), Gate()
    gate.close_around(lm)
    with running(served(lm)) as first:
        port, scorer = int(first.url.rpartition(":")[2]), first.scorer(wait_s=30)
    answers = []

    async def ask() -> None:
        answers.extend(await scorer.score(views(2), SignalKind.SAMPLED))

    gate.open()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.sleep(0.5)
        assert not answers
        with running(served(lm), port=port):
            await until(lambda: len(answers) == 2)
    expected = await TransformersScorer("t", lm).score(views(2), SignalKind.SAMPLED)
    torch.testing.assert_close(answers[0].logprobs, expected[0].logprobs, atol=1e-4, rtol=0)


@pytest.mark.anyio
@pytest.mark.parametrize("fingerprint", ["w", "other"])
async def test_other_weights_behind_the_same_address_are_refused(fingerprint: str):
    """Their files tell them apart, or, for a hub id that was pushed to, what was loaded does."""
    with running(served(llama(seed=1))) as first:
        port, scorer = int(first.url.rpartition(":")[2]), first.scorer()
        await scorer.score(views(1), SignalKind.SAMPLED)
    with running(served(llama(seed=2), weights=fingerprint), port=port):
        for need in (SignalKind.SAMPLED, SignalKind.FULL):
            with pytest.raises(TeacherError, match=r"have changed|other weights"):
                await scorer.score(views(1), need)


@pytest.mark.anyio
async def test_a_service_that_is_gone_is_waited_for_once_and_not_for_every_request():
    with running(served(llama())) as service:
        scorer = service.scorer(wait_s=1)
    started = time.monotonic()
    for _ in range(10):
        with pytest.raises(TeacherError, match="cannot be reached"):
            await scorer.score(views(1), SignalKind.SAMPLED)
    assert time.monotonic() - started < 8


@pytest.mark.anyio
async def test_a_service_that_never_answers_is_given_up(service: Running):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        scorer = RemoteScorer("far", url, service.info, "t", deadline_s=0.3)
        with pytest.raises(TeacherError, match="did not answer within"), anyio.fail_after(10):
            await scorer.score(views(1), SignalKind.SAMPLED)


@pytest.mark.anyio
async def test_a_service_that_fell_silent_is_looked_after_and_used_again_when_it_answers(
    service: Running, monkeypatch: pytest.MonkeyPatch
):
    """Many requests of a frozen service cost one deadline and one look, not one of each."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        port = frozen.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        scorer = RemoteScorer("far", url, service.info, "t", token=TOKEN, deadline_s=0.5)
        monkeypatch.setattr(connection, "LOOK_S", 0.5)
        with anyio.fail_after(20):
            for said in ["did not answer within 0.5 s", *["has not answered since"] * 50]:
                with pytest.raises(TeacherError, match=said):
                    await scorer.score(views(1), SignalKind.SAMPLED)
        frozen.setblocking(False)
        asked = 0
        with suppress(BlockingIOError):
            while frozen.accept():
                asked += 1
        assert asked == 2, "one request and one look"
    with running(served(llama()), port=port):
        with pytest.raises(TeacherError, match="has not answered since"):
            await scorer.score(views(1), SignalKind.SAMPLED)
        monkeypatch.setattr(scorer._connection, "_look_at", 0.0)  # half a minute later
        assert len(await scorer.score(views(2), SignalKind.SAMPLED)) == 2


@contextmanager
def impostor(status: int, body: bytes, *headers: tuple[str, str]) -> Iterator[str]:
    """Something that gives every request one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in (*headers, ("content-length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.anyio
@pytest.mark.parametrize("alive", [True, False])
async def test_long_requests_that_break_off_are_tried_again_by_a_service_that_is_alive(alive: bool):
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            if asked.count("/score") > 2:
                self.answer()
            elif asked.count("/score") == 2:
                time.sleep(0.7)  # longer than a service is waited for; then, as the first time, no answer

        def do_GET(self) -> None:
            if alive:
                self.answer()

        def answer(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        far = connection.Connection(f"http://127.0.0.1:{server.server_address[1]}", None, wait_s=0.5, deadline_s=20)
        with nullcontext() if alive else pytest.raises(TeacherError, match="cannot be reached"):
            async with far.open() as client:
                assert (await far.ask(client, "POST", "/score", max_bytes=10, content=b"x")).status == 200
        server.shutdown()
    assert asked.count("/score") == (3 if alive else 2)


MARK = ("protege-teacher", "1")


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b"", b"<html>", b"PRTG\x01\x00\x04\x00\x00\x00null", b"x" * 100_000])
async def test_an_answer_that_is_none_is_an_error(service: Running, body: bytes):
    with impostor(200, body, MARK) as url:
        scorer = RemoteScorer("far", url, service.info, "t")
        with pytest.raises(TeacherError):
            await scorer.score(views(1), SignalKind.SAMPLED)


@pytest.mark.anyio
@pytest.mark.parametrize("wait", ["9" * 5000, "-1", "1e9", "soon"])
async def test_a_strange_time_to_come_back_is_not_waited_for(service: Running, wait: str):
    with impostor(503, b"", MARK, ("retry-after", wait)) as url:
        scorer = RemoteScorer("far", url, service.info, "t", deadline_s=0.5)
        with pytest.raises(TeacherError, match=r"status 503|did not answer"), anyio.fail_after(10):
            await scorer.score(views(1), SignalKind.SAMPLED)


@pytest.mark.parametrize("token", ["two words", "a\nb", "ünïcode", ""])
def test_a_token_that_no_header_can_hold_is_not_shown(service: Running, token: str):
    with pytest.raises(ConfigError) as error:
        service.scorer(token=token)
    assert not token or token not in str(error.value)


@pytest.mark.anyio
async def test_a_refusal_is_told_with_the_services_words(service: Running):
    with pytest.raises(TeacherError, match=r"far at .*the token is missing or wrong"):
        await service.scorer(token="not-the-right-token").score(views(1), SignalKind.SAMPLED)
    with pytest.raises(TeacherError, match="more than the 1024"):
        big = RemoteScorer("far", service.url, service.info, "t", token=TOKEN)
        big.model = big.model.model_copy(update={"vocab_size": 5000})
        await big.score(views(1), TeacherTopK(2000))


# --- what a service says of itself


@pytest.mark.anyio
async def test_a_service_describes_itself(service: Running):
    found = await describe(service.url + "/", TOKEN)
    assert found == service.info
    assert find_model(found, None, service.url).name == "t"
    with pytest.raises(ConfigError, match="serves t, not u"):
        find_model(found, "u", service.url)
    with pytest.raises(ConfigError, match="refuses: the token"):
        await describe(service.url, "not-the-right-token")


def test_what_does_not_fit_is_said_at_the_start(service: Running):
    model = find_model(service.info, None, service.url)
    fits = dict(tokenizer="tok", tokenizer_name="./mine", need=TeacherTopK(61), temperature=0.7)

    def check(**changes: Any) -> None:
        check_fit(service.info, model, url=service.url, **{**fits, **changes})

    check()
    check(need=SignalKind.FULL)
    check(need=TeacherTopK(10_000))  # more than the vocabulary is all of it
    with pytest.raises(TokenizerMismatchError, match=r"\./mine.*is not the one that t at http"):
        check(tokenizer="other")
    with pytest.raises(ConfigError, match=r"temperature=0\.001"):
        check(temperature=0.001)
    model = model.model_copy(update={"vocab_size": 5000})
    with pytest.raises(ConfigError, match="start the service with max_top_k=2000"):
        check(need=TeacherTopK(2000))


@pytest.mark.anyio
@pytest.mark.parametrize("status", [200, 401, 404, 500])
async def test_another_server_is_not_ours(status: int):
    with impostor(status, b'{"detail":"Not Found"}') as url:
        assert await describe(url, TOKEN) is None


@pytest.mark.anyio
async def test_another_version_is_named():
    with (
        impostor(200, b'{"service":"protege-teacher","version":9,"new":1}', MARK) as url,
        pytest.raises(ConfigError, match="version 9, this side is protege-teacher version 1"),
    ):
        await describe(url)
    with impostor(200, b"{}", MARK) as url, pytest.raises(TeacherError, match="cannot be understood"):
        await describe(url)


@pytest.mark.anyio
@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://user:secret@host"])
async def test_an_address_that_is_none(url: str):
    with pytest.raises(ConfigError) as error:
        await describe(url)
    assert "secret" not in str(error.value)


@pytest.mark.anyio
async def test_nobody_there_is_said_soon():
    with pytest.raises(TeacherError, match="cannot be reached"):
        await describe("http://127.0.0.1:9", wait_s=0.3)


def test_metrics_are_prometheus_text(service: Running):
    headers = {"authorization": f"Bearer {TOKEN}"}
    text = httpx2.get(service.url + "/metrics", headers=headers, trust_env=False).text
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert 'protege_teacher_loaded{model="t"}' in text and "protege_teacher_queue_tokens 0" in samples
    for line in samples:
        assert re.fullmatch(r'protege_teacher_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+', line), line
