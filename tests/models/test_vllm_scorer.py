"""A teacher on a plain vLLM server: its numbers, and every way in which it can fail to give them."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from errors import ConfigError, TeacherError, TokenizerMismatchError
from models import server_pool
from models.device_thread import compute_blocking
from models.server_pool import IN_FLIGHT, Access, ServerPool
from models.types import Signal, SignalKind, SignalSpec, TeacherTopK, TeacherView
from models.vllm import scorer as vllm_scorer
from models.vllm import teacher_server as vllm
from models.vllm.scorer import VllmScorer
from tests.models import tiny
from tests.models.conformance import ScorerEngine, ScorerSuite
from tests.models.scripted_teacher import Fault, ScriptedTeacher

MODEL = tiny.model()
SAMPLED = SignalKind.SAMPLED


def scripted(**options: Any) -> ScriptedTeacher:
    return ScriptedTeacher(partial(tiny.plain_logits, MODEL), tiny.VOCAB, **options)


def access(*servers: ScriptedTeacher, **options: Any) -> Access:
    return Access(tuple(server.url for server in servers), **{"timeout_s": 5.0, "patience_s": 0.3, **options})


def scorer(*servers: ScriptedTeacher, **options: Any) -> VllmScorer:
    return VllmScorer("T", "teacher", ServerPool(access(*servers, **options)), vocab_size=tiny.VOCAB)


def view(*ids: int, swap: tuple[int, int] | None = None) -> TeacherView:
    where = np.arange(1, len(ids))
    return TeacherView(np.array(ids), where, where, swap)


def score(teacher: VllmScorer, *views: TeacherView, need: SignalSpec = SAMPLED) -> list[Signal]:
    return anyio.run(teacher.score, views, need)


@pytest.fixture
def server() -> Iterator[ScriptedTeacher]:
    with scripted() as server:
        yield server


class TestConformance(ScorerSuite):
    @pytest.fixture
    def engine(self, server: ScriptedTeacher) -> ScorerEngine:
        def make(temperature: float) -> VllmScorer:
            if temperature != 1.0:
                with pytest.raises(ConfigError, match=r"temperature=1, or .* recipes.serve_teacher"):
                    VllmScorer(
                        "T", "teacher", ServerPool(access(server)), vocab_size=tiny.VOCAB, temperature=temperature
                    )
                pytest.skip("a plain vLLM server scores at temperature 1 alone")
            return scorer(server)

        return ScorerEngine(
            make=make,
            vocab_size=tiny.VOCAB,
            reference=partial(tiny.plain_logprobs, MODEL),
            distribution=lambda ids, temperature: (tiny.plain_logits(MODEL, ids) / temperature).log_softmax(-1),
            gives_full=False,
        )


# --- what is asked, and what is read


def test_a_request_holds_ids_and_the_k_that_is_needed(server: ScriptedTeacher):
    part = TeacherView(np.array([3, 4, 5, 6, 7, 8]), np.array([2, 4]), np.array([0, 1]))
    (signal,) = score(scorer(server), part, need=TeacherTopK(3))
    (body,) = server.completions
    assert body == {
        "model": "teacher", "prompt": [3, 4, 5, 6, 7, 8], "prompt_logprobs": 3, "max_tokens": 1, "temperature": 0.0,
    }  # fmt: skip
    rows = tiny.plain_logits(MODEL, [3, 4, 5, 6, 7]).log_softmax(-1)[[1, 3]]
    torch.testing.assert_close(signal.logprobs, rows.gather(1, torch.tensor([[5], [7]]))[:, 0])
    torch.testing.assert_close(signal.topk_logprobs, rows.topk(3).values)


def test_answers_are_read_beside_the_event_loop_and_torch_computes_on_the_devices_thread(
    server: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch
):
    threads: dict[str, set[int]] = {"read": set(), "signal": set()}

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: threads[name].add(threading.get_ident()) or function(*arguments, **options)

    monkeypatch.setattr(vllm_scorer, "_read", noted("read", vllm_scorer._read))
    monkeypatch.setattr(vllm_scorer, "Signal", noted("signal", Signal))
    score(scorer(server), view(3, 4, 5), view(5, 6), need=TeacherTopK(3))
    assert threads["signal"] == {compute_blocking(threading.get_ident)}
    assert threads["read"] and threading.get_ident() not in threads["read"]


def test_the_sampled_token_counts_among_the_top_k_only_where_it_is_one_of_them(server: ScriptedTeacher):
    best = int(tiny.plain_logits(MODEL, [3]).argmax())
    worst = int(tiny.plain_logits(MODEL, [3, best]).argmin(-1)[-1])
    (signal,) = score(scorer(server), view(3, best, worst), need=TeacherTopK(2))
    assert signal.topk_ids is not None and signal.logprobs is not None and signal.topk_logprobs is not None
    assert signal.topk_ids[0, 0] == best and signal.topk_logprobs[0, 0] == signal.logprobs[0]
    assert worst not in signal.topk_ids[1].tolist() and signal.logprobs[1] < signal.topk_logprobs[1, 1]


def test_a_vocabulary_smaller_than_k_is_taken_whole():
    with scripted(max_logprobs=500) as server:
        (signal,) = score(scorer(server), view(3, 4, 5), need=TeacherTopK(500))
    assert server.completions[0]["prompt_logprobs"] == tiny.VOCAB  # more would end the server's engine
    assert signal.topk_ids is not None and sorted(signal.topk_ids[0].tolist()) == list(range(tiny.VOCAB))


def test_nothing_to_score_asks_nothing(server: ScriptedTeacher):
    empty = TeacherView(np.array([1, 2]), np.array([], dtype=int), np.array([], dtype=int))
    (signal,) = score(scorer(server), empty, need=TeacherTopK(4))
    assert signal.topk_ids is not None and signal.topk_ids.shape == (0, 4) and not server.requests


def test_whole_distributions_are_not_given(server: ScriptedTeacher):
    with pytest.raises(TeacherError, match="does not give full"):
        score(scorer(server), view(1, 2), need=SignalKind.FULL)


def rows_of(answer: dict[str, Any]) -> list[Any]:
    return answer["choices"][0]["prompt_logprobs"]


def change(position: int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Every logprob of that position becomes `value`."""

    def fault(answer: dict[str, Any]) -> None:
        for entry in rows_of(answer)[position].values():
            entry["logprob"] = value

    return fault


def without(position: int, token: int) -> Callable[[dict[str, Any]], None]:
    return lambda answer: rows_of(answer)[position].pop(str(token))


BAD_ANSWERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no logprobs": (lambda answer: answer["choices"][0].pop("prompt_logprobs"), "no completion|not a completion"),
    "null logprobs": (lambda answer: answer["choices"][0].update(prompt_logprobs=None), "no positions"),
    "a position too few": (lambda answer: rows_of(answer).pop(), "2 positions, 3 were asked for"),
    "a null position": (lambda answer: rows_of(answer).__setitem__(2, None), "position 2 has no logprobs"),
    "a null logprob": (change(1, None), "position 1 is missing"),
    "another token's": (without(2, 5), "token 5 at position 2"),
    "not a number": (change(2, math.nan), "not a number"),
    "infinite": (change(2, math.inf), "not a number"),
    "vLLM's minus infinity": (change(2, -9999.0), "token 5 at position 2 has no finite logprob"),
    "logits": (change(1, 12.5), "--logprobs-mode"),
    "more than a distribution": (change(1, -0.1), "--logprobs-mode"),
    "fewer than k": (lambda a: [rows_of(a)[1].popitem() for _ in range(2)], "at position 1, 4 were asked for"),
    "an id that is none": (
        lambda a: rows_of(a)[1].update({"-7": rows_of(a)[1].popitem()[1]}),
        "1 has a logprob of what",
    ),
    "no choices": (lambda answer: answer.clear(), "not a completion"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_without_the_numbers_is_an_error_and_is_not_asked_for_again(server: ScriptedTeacher, name: str):
    fault, says = BAD_ANSWERS[name]
    server.faults.append(fault)
    with pytest.raises(TeacherError, match=says):
        score(scorer(server), view(3, 4, 5), need=TeacherTopK(4))
    assert len(server.completions) == 1


def test_a_likely_token_of_probability_zero_is_no_token(server: ScriptedTeacher):
    def fault(answer: dict[str, Any]) -> None:
        row = rows_of(answer)[1]
        last = [token for token in row if token != "4"][-1]
        row[last]["logprob"] = -9999.0

    server.faults.append(fault)
    (signal,) = score(scorer(server), view(3, 4), need=TeacherTopK(4))
    assert signal.topk_logprobs is not None and signal.topk_logprobs[0, -1] == -math.inf


# --- servers that fail


def test_many_requests_of_a_frozen_server_cost_one_timeout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_pool, "LOOK_S", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as frozen:  # takes connections, and says nothing
        pool = ServerPool(Access((f"http://127.0.0.1:{frozen.getsockname()[1]}",), timeout_s=0.5, patience_s=0.3))
        teacher = VllmScorer("T", "teacher", pool, vocab_size=tiny.VOCAB)
        for _ in range(10):
            with pytest.raises(TeacherError, match="no answer for"):
                score(teacher, view(3, 4, 5))
        frozen.setblocking(False)
        asked: Counter[bytes] = Counter()
        with suppress(BlockingIOError):
            while True:
                connection, _ = frozen.accept()
                asked[connection.recv(4)] += 1
                connection.close()
    assert asked[b"POST"] == 1 and asked[b"GET "] >= 1


@pytest.mark.parametrize("fault", [500, 503, 429, "close"])
def test_what_passes_is_tried_again(server: ScriptedTeacher, fault: Fault):
    server.faults.append(fault)
    (signal,) = score(scorer(server, patience_s=5.0), view(3, 4, 5))
    assert signal.logprobs is not None and len(server.completions) == 2
    torch.testing.assert_close(signal.logprobs, tiny.plain_logprobs(MODEL, [3], [4, 5]))


def test_what_the_server_refuses_is_not(server: ScriptedTeacher):
    with pytest.raises(TeacherError, match="Token id 61 is out of vocabulary"):
        score(scorer(server), view(3, 61))
    assert len(server.completions) == 1


def test_a_view_that_always_fails_is_given_up(server: ScriptedTeacher):
    server.always = 500
    pool = ServerPool(access(server), sleep=lambda _: anyio.sleep(0))
    with pytest.raises(TeacherError, match="scripted 500, 4 times"):
        score(VllmScorer("T", "teacher", pool, vocab_size=9), view(3, 4))
    assert len(server.completions) == 4


def test_a_dead_server_fails_within_the_patience_and_at_once_the_next_time():
    with scripted() as server:
        pass
    teacher = scorer(server, patience_s=0.4)
    started = time.monotonic()
    with pytest.raises(TeacherError, match=r"T could not score 2 tokens: no answer for .*ConnectError"):
        score(teacher, view(3, 4))
    assert 0.4 <= time.monotonic() - started < 5
    started = time.monotonic()
    for _ in range(5):
        with pytest.raises(TeacherError):
            score(teacher, view(3, 4))
    assert time.monotonic() - started < 1, "the episodes after the first wait no longer"


def test_a_hanging_server_is_not_waited_for(server: ScriptedTeacher):
    server.always = "hang"
    started = time.monotonic()
    with pytest.raises(TeacherError):
        score(scorer(server, timeout_s=0.3, patience_s=0.1), *[view(3, 4 + i) for i in range(5)])
    assert time.monotonic() - started < 5


def test_two_servers_share_the_work_and_one_takes_over_when_the_other_dies():
    views = [view(3, 4 + i, 5) for i in range(12)]
    with scripted(delay_s=0.02) as first:
        with scripted(delay_s=0.02) as second:
            teacher = scorer(first, second)
            score(teacher, *views)
            assert min(len(first.completions), len(second.completions)) >= 3
        signals = score(teacher, *views)
        for one, signal in zip(views, signals, strict=True):
            expected = tiny.plain_logprobs(MODEL, [3], one.token_ids[1:].tolist())
            torch.testing.assert_close(signal.logprobs, expected)


def test_a_server_that_comes_back_is_used_again():
    with scripted() as server:
        teacher = scorer(server, patience_s=0.0)
        score(teacher, view(3, 4))
    with pytest.raises(TeacherError):
        score(teacher, view(3, 4))
    with scripted(port=server.port) as again:
        time.sleep(0.6)  # the first pause
        score(teacher, *[view(3, 4) for _ in range(8)])  # all but the first wait until that one has looked
        assert len(again.completions) == 8


@pytest.mark.anyio
async def test_requests_wait_for_a_look_at_a_server_that_failed_once_and_not_for_a_whole_answer(
    server: ScriptedTeacher,
):
    server.faults.append(503)
    teacher = scorer(server, patience_s=0.8)
    signals = []

    async def ask() -> None:
        signals.extend(await teacher.score([view(3, 4)], SAMPLED))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            while not server.completions:
                await anyio.sleep(0.01)
            server.delay_s = 1.5  # longer than the patience
            for _ in range(4):
                tasks.start_soon(ask)
    assert len(signals) == 5 and server.most_at_once >= 4


def test_requests_in_flight_are_bounded():
    with scripted(delay_s=0.05) as server:
        score(scorer(server), *[view(3, 4) for _ in range(3 * IN_FLIGHT)])
        assert 1 < server.most_at_once <= IN_FLIGHT


def test_the_token_is_sent_and_never_shown(server: ScriptedTeacher):
    server.token = "s3cret"
    score(scorer(server, token="s3cret"), view(3, 4))
    wrong = scorer(server, token="wr0ng")
    with pytest.raises(TeacherError, match="401") as error:
        score(wrong, view(3, 4))
    assert "wr0ng" not in str(error.value) + repr(access(server, token="wr0ng"))


# --- the start


def describe(how: Access, served_model: str | None = None) -> vllm.VllmServer:
    return anyio.run(vllm.describe, how, served_model, "teacher.")


def test_a_server_says_what_it_serves():
    with scripted(root="/models/t", max_model_len=300) as one, scripted(root="/models/t", max_model_len=200) as two:
        assert describe(access(one, two)) == vllm.VllmServer("teacher", "/models/t", 200)


def test_servers_of_two_models_and_models_that_are_not_there_are_refused(server: ScriptedTeacher):
    with scripted(models=("other",)) as other, scripted(models=("a", "b")) as both:
        with pytest.raises(ConfigError, match=r"serves teacher, .* serves other"):
            describe(access(server, other))
        with pytest.raises(ConfigError, match=r"serves a, b: say which is the teacher, teacher.served_model="):
            describe(access(both))
        with pytest.raises(ConfigError, match=r"served_model=c: .* serves a, b"):
            describe(access(both), "c")
        assert describe(access(both), "b").model == "b"


def test_nothing_there_no_token_and_something_else_are_told_apart(server: ScriptedTeacher):
    server.token = "s3cret"
    with pytest.raises(ConfigError, match=r"wants a token.* teacher.token_env= or teacher.token_file="):
        describe(access(server))
    with pytest.raises(ConfigError, match="404"):
        describe(replace(access(server, token="s3cret"), urls=(server.url + "/nowhere",)))
    with scripted() as gone:
        pass
    with pytest.raises(ConfigError, match="Start the server"):
        describe(access(gone))


def check_tokenizer(server: ScriptedTeacher, tokenizer: Any) -> str | None:
    found = vllm.VllmServer("teacher", "t", 100)
    return anyio.run(vllm.check_tokenizer, access(server), found, "T", tokenizer, "./teacher")


def test_every_id_must_mean_the_same_to_the_server():
    ours = tiny.chat(tiny.CHATML, eos="<|im_end|>")
    with scripted(tokenizer=tiny.chat(tiny.BRACKETS, eos="<|end|>")) as server:
        assert check_tokenizer(server, ours) is None
    vocab = {token: i for token, i in ours.get_vocab().items() if not token.startswith("<|")}
    letters = {i: token for token, i in vocab.items()}
    vocab[letters[40]], vocab[letters[41]] = 41, 40
    with (
        scripted(tokenizer=tiny.chat(tiny.CHATML, eos="<|im_end|>", vocab=vocab)) as server,
        pytest.raises(TokenizerMismatchError, match=r"T: its tokenizer is ./teacher's .* and id 40 is"),
    ):
        check_tokenizer(server, ours)
    other = tiny.chat(None, eos="<|end|>", merges=[("t", "h"), ("h", "e"), ("i", "n")])
    with scripted(tokenizer=other) as server, pytest.raises(TokenizerMismatchError):
        check_tokenizer(server, ours)


def test_a_server_without_a_tokenizer_cannot_say(server: ScriptedTeacher):
    assert "cannot say which tokenizer" in (check_tokenizer(server, tiny.letters()) or "")


def probe(*servers: ScriptedTeacher, need: SignalSpec = SAMPLED) -> float:
    found = vllm.VllmServer("teacher", "t", 100)
    call = partial(vllm.probe, vocab_size=tiny.VOCAB, option="teacher.")
    return anyio.run(call, access(*servers), found, "T", view(3, 4, 5), need)


def test_a_server_that_answers_alike_passes(server: ScriptedTeacher):
    assert probe(server, need=TeacherTopK(20)) == 0.0
    assert [body["prompt_logprobs"] for body in server.completions] == [20, 20]


def test_too_large_a_k_is_refused_with_both_ways_out(server: ScriptedTeacher):
    with pytest.raises(ConfigError, match=r"max allowed: 20.*--max-logprobs 21, or lower top_k=21"):
        probe(server, need=TeacherTopK(21))


def test_noise_and_servers_of_other_weights_are_refused(server: ScriptedTeacher):
    server.faults.extend([lambda answer: None, change(1, -4.0)])
    with pytest.raises(ConfigError, match=r"scored one sequence twice and differs by"):
        probe(server)
    other = tiny.model(seed=1)
    with (
        ScriptedTeacher(partial(tiny.plain_logits, other), tiny.VOCAB) as second,
        pytest.raises(ConfigError, match=f"teacher.url={second.url}: teacher T differs from the first server"),
    ):
        probe(server, second)


@pytest.mark.parametrize("logit", [7.0, -30.0])
def test_logits_are_no_logprobs(server: ScriptedTeacher, logit: float):
    server.always = change(1, logit)
    with pytest.raises(ConfigError, match="--logprobs-mode=raw_logprobs"):
        probe(server)
