"""What the service refuses, one by one, over a real socket, and what its refusals do not say."""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import httpx2
import numpy as np
import pytest
import tiny
from teacher_services import TOKEN, Running, llama, running, served

from errors import ConfigError, ModelError
from models.teacher_service import hosting, wire
from models.teacher_service.messages import (
    MAX_VIEWS,
    Reading,
    RequestFields,
    ScoreRequest,
    decode_request,
    encode_request,
)
from models.teacher_service.server import ServiceLimits
from models.teacher_service.serving import listen
from models.teacher_service.token import TOKEN_VARIABLE, read_token
from models.teacher_service.wire import MEDIA_TYPE
from models.types import SignalKind, TeacherView

SECRET_PATH = "/home/somebody/models/secret-teacher"


def explode() -> Any:
    raise ModelError(f"cannot load {SECRET_PATH}")


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    lm = llama()
    limits = ServiceLimits(request_tokens=600, answer_bytes=20_000, top_k=20, read_timeout_s=0.5)
    broken = served(lm, "broken", weights="b", load=explode)
    with running(served(lm), broken, limits=limits) as service:
        yield service


def ask(service: Running, method: str, path: str, *, token: str | None = TOKEN, **options: Any) -> httpx2.Response:
    headers = {"content-type": MEDIA_TYPE, **options.pop("headers", {})}
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    with httpx2.Client(trust_env=False, timeout=20, verify=False) as client:  # no certificates to read for http://
        return client.request(method, service.url + path, headers=headers, **options)


def request(ids: Any = (1, 2, 3, 4), *, model: str = "t", weights: str = "w", need: str = "sampled", **fields: Any):
    ids = np.array(ids)
    header = RequestFields.model_validate(
        {"model": model, "weights": weights, "need": need, "temperature": 1.0, **fields}
    )
    return encode_request(ScoreRequest(header, [Reading(ids, np.arange(1, len(ids)))]))


def post(service: Running, content: Any, **options: Any) -> httpx2.Response:
    return ask(service, "POST", "/score", content=content, **options)


def refused(response: httpx2.Response, status: int) -> str:
    """The one sentence of a refusal, which says nothing of the host."""
    assert response.status_code == status, response.text
    text = response.json()["error"]
    assert "\n" not in text and len(text) < 400
    assert not any(secret in text for secret in (SECRET_PATH, str(Path.cwd()), str(Path.home()), "Traceback", TOKEN))
    return text


def test_a_sound_request_is_answered(service: Running):
    response = post(service, request())
    assert response.status_code == 200 and response.headers["content-type"] == MEDIA_TYPE
    assert wire.decode(bytearray(response.content), max_array_bytes=100).arrays["logprobs"].shape == (3,)


# --- who is let in


@pytest.mark.parametrize("path", ["/info", "/metrics", "/score", "/head", "/docs", "/nothing"])
def test_without_the_token_every_path_is_shut(service: Running, path: str):
    for token in (None, "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ünïcode"):
        headers = {} if token is None else {"authorization": f"Bearer {token}".encode()}
        response = ask(service, "POST" if path == "/score" else "GET", path, token=None, headers=headers)
        refused(response, 401)
        assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("header", [TOKEN, f"Basic {TOKEN}", f"Token {TOKEN}"])
def test_another_scheme_is_no_token(service: Running, header: str):
    refused(ask(service, "GET", "/info", token=None, headers={"authorization": header}), 401)


def test_health_is_open_and_says_nothing(service: Running):
    response = ask(service, "GET", "/health", token=None)
    assert response.json() == {"status": "ok"} and "server" not in response.headers


def test_the_token_stands_in_no_log(service: Running, caplog: pytest.LogCaptureFixture, capfd: Any):
    with caplog.at_level(logging.DEBUG):
        ask(service, "GET", "/info")
        ask(service, "GET", "/info", token=TOKEN + "x")
        post(service, request(model="broken", weights="b"))
    out, err = capfd.readouterr()
    assert "could not be loaded" in caplog.text
    assert TOKEN not in caplog.text + out + err


def test_an_unauthorised_body_is_not_read(service: Running):
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil:1"])
def test_without_a_token_a_web_page_cannot_reach_it_by_its_own_name(host: str):
    with running(served(llama()), token=None) as service:
        refused(ask(service, "GET", "/info", token=None, headers={"host": host}), 403)
        assert ask(service, "GET", "/info", token=None).status_code == 200
        assert ask(service, "GET", "/info", token=None, headers={"host": "localhost:1"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_off_loopback_needs_a_token(host: str):
    with pytest.raises(ConfigError, match="token"):
        listen(host, 0, token=None)
    listen("0.0.0.0", 0, token=TOKEN).close()
    listen("localhost", 0, token=None).close()


def test_an_address_that_cannot_be_had_is_the_users_to_change():
    with listen("127.0.0.1", 0, token=None) as taken, pytest.raises(ConfigError, match="another port"):
        listen("127.0.0.1", taken.getsockname()[1], token=None)
    for host in ("no-such-host.invalid", "a" * 64, "a..b"):
        with pytest.raises(ConfigError, match=f"host={host}: no such address here"):
            listen(host, 1, token=None)


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_token(None) == TOKEN
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert read_token(str(tmp_path / "token")) == "0123456789abcdef"
    for bad in ("", "short", "two words of a token", "ü" * 20):
        (tmp_path / "token").write_text(bad)
        with pytest.raises(ConfigError) as error:
            read_token(str(tmp_path / "token"))
        assert not bad or bad not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(str(tmp_path / "none"))


# --- what is let in


def test_another_media_type_is_refused(service: Running):
    refused(post(service, request(), headers={"content-type": "application/json"}), 415)


def test_an_announced_length_over_the_limit_is_refused_before_it_is_sent(service: Running):
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {MEDIA_TYPE}\r\n"
        connection.sendall(f"{head}Content-Length: 100000000\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_without_a_length_is_cut_off_at_the_limit(service: Running):
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1000)

    assert "limit" in refused(post(service, endless()), 413)


def test_a_body_that_never_ends_is_given_up(service: Running):
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {MEDIA_TYPE}\r\n"
        connection.sendall(f"{head}Content-Length: 500\r\n\r\nPRTG".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_client_that_goes_away_in_mid_body_is_counted_and_no_failure(
    service: Running, caplog: pytest.LogCaptureFixture, capfd: Any
):
    before = service.service.metrics_text()
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {wire.MEDIA_TYPE}\r\n"
    with connect(service) as connection:
        connection.sendall(f"{head}Content-Length: 500\r\n\r\nPRTG".encode())
        time.sleep(0.1)
    deadline = time.monotonic() + 10
    while (after := service.service.metrics_text()) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counted(after, "abandoned_total") == counted(before, "abandoned_total") + 1
    status = 'requests_total{path="/score",status="%d"}'
    assert counted(after, status % 499) == counted(before, status % 499) + 1
    assert counted(after, status % 500) == counted(before, status % 500)
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


def counted(metrics: str, name: str) -> float:
    values = [line.split()[-1] for line in metrics.splitlines() if line.startswith(f"protege_teacher_{name} ")]
    return float(values[0]) if values else 0.0


def test_more_views_than_a_request_has_are_refused_before_they_are_looked_at():
    fields = RequestFields(model="t", weights="w", need="sampled", temperature=1.0)
    none = [Reading(np.array([1]), np.array([], dtype=int))] * 65_536
    content = encode_request(ScoreRequest(fields, none))
    assert len(content) < 10_000
    with running(served(llama())) as service:
        assert "65536 views, at most 4096" in refused(post(service, content), 413)
    most = bytearray(encode_request(ScoreRequest(fields, none[:MAX_VIEWS])))
    assert len(decode_request(most, max_tokens=MAX_VIEWS).readings) == MAX_VIEWS


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"", 400, "prefix"),
        (b"\x80\x04\x95 a pickle", 400, "prefix|no message"),
        (request()[:-5], 400, "announces"),
        (request().replace(b"PRTG\x01", b"PRTG\x07"), 400, "version 7"),
        (request(model="other"), 404, "no model 'other' here, there are t, broken"),
        (request(weights="old"), 409, "other weights"),
        (request([1, 2, tiny.VOCAB]), 422, f"no token {tiny.VOCAB}"),
        (request([1, 2, -1]), 422, "no token -1"),
        (request(np.ones(513)), 422, "513 tokens, t reads 512"),
        (request(np.ones(601)), 413, "at most 600"),
        (request(temperature=1e-3), 422, "outside 0.01 to 100"),
        (request(need="topk", k=21), 422, "more than the 20"),
        (request(np.ones(400), need="full", hidden_dtype="float32"), 413, "would have 51072 bytes"),
        (request(model="broken", weights="b"), 500, "could not be loaded .ModelError.; the service's log says why"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_reason(service: Running, content: bytes, status: int, says: str):
    assert re.search(says, refused(post(service, content), status))


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("model=x", 404),
        ("model=t&weights=v", 409),
        ("model=t&start=60&rows=5", 422),
        ("model=t&start=-1&rows=5", 400),
        ("model=t&rows=99999999999999999999", 400),
        ("model=t&rows=1e3", 400),
        ("model=broken", 500),
    ],
)
def test_a_piece_of_a_head_that_there_is_not(service: Running, query: str, status: int):
    refused(ask(service, "GET", f"/head?{query}"), status)


def test_other_paths_and_methods(service: Running):
    refused(ask(service, "GET", "/nothing"), 404)
    refused(ask(service, "GET", "/../../etc/passwd"), 404)
    refused(ask(service, "GET", "/docs"), 404)
    refused(ask(service, "GET", "/openapi.json"), 404)
    refused(ask(service, "GET", "/score"), 405)


def test_a_failure_says_nothing_of_this_machine():
    lm = llama()

    def fail(sequences: Any) -> Any:
        raise RuntimeError(f"in {SECRET_PATH}: out of memory")

    with running(served(lm)) as service:
        lm.hidden = fail  # type: ignore[method-assign]
        assert "its log says why" in refused(post(service, request()), 500)
        lm.hidden = lambda sequences: {}[SECRET_PATH]  # type: ignore[method-assign]  # a bug
        assert "its log says why" in refused(post(service, request()), 500)
        del lm.hidden
        assert post(service, request()).status_code == 200, "the service lives on"


# --- connections


def connect(service: Running) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def is_closed(connection: socket.socket) -> bool:
    """Waits for the other side to close it: nothing else comes."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def drip(connection: socket.socket, data: bytes) -> int:
    """Send a byte at a time until the other side has closed; returns how many were sent."""
    connection.setblocking(False)
    for i in range(len(data)):
        try:
            connection.send(data[i : i + 1])
            if connection.recv(1) == b"":
                return i
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            return i
    return len(data)


HEAD = f"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    with running(served(llama()), limits=ServiceLimits(head_timeout_s=0.3, connections=4)) as service:
        yield service


def test_a_connection_that_asks_nothing_is_closed(impatient: Running):
    with connect(impatient) as silent, connect(impatient) as begun:
        begun.sendall(HEAD)
        assert is_closed(silent) and is_closed(begun)


def test_a_request_that_comes_byte_by_byte_is_cut_off(impatient: Running):
    """However long it goes on: the time is for the whole of its first lines, also of a connection's second request."""
    endless = HEAD + b"X-Padding: " + b"x" * 5000
    with connect(impatient) as first:
        assert drip(first, endless) < len(endless)
    with connect(impatient) as second:
        second.sendall(HEAD + b"\r\n")
        assert second.recv(1000).startswith(b"HTTP/1.1 200")
        assert drip(second, endless) < len(endless)


def test_an_unread_body_of_a_refused_request_is_cut_off(impatient: Running):
    with connect(impatient) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")
        assert drip(connection, b"x" * 5000) < 5000


def test_a_request_under_way_is_not_cut_off():
    lm, go_on = llama(), threading.Event()
    hidden = lm.hidden
    lm.hidden = lambda sequences: go_on.wait(20) and hidden(sequences)  # type: ignore[method-assign,assignment]
    with running(served(lm), limits=ServiceLimits(head_timeout_s=0.1)) as service, ThreadPoolExecutor() as threads:
        answer = threads.submit(post, service, request())
        time.sleep(0.5)
        go_on.set()
        assert answer.result(20).status_code == 200


def test_answers_that_are_made_or_not_fetched_have_a_bound_for_all_together():
    lm, begun, go_on = llama(), threading.Event(), threading.Event()
    hidden = lm.hidden

    def slow(sequences: Any) -> Any:
        begun.set()
        return go_on.wait(20) and hidden(sequences)

    lm.hidden = slow  # type: ignore[method-assign]
    limits = ServiceLimits(held_bytes=1)  # one answer at a time, whatever its size
    with running(served(lm), limits=limits) as service, ThreadPoolExecutor() as threads:
        first = threads.submit(post, service, request())
        assert begun.wait(20)
        second = post(service, request())
        assert "bytes are made or sent already" in refused(second, 503) and second.headers["retry-after"] == "2"
        go_on.set()
        assert first.result(20).status_code == 200
        assert post(service, request(model="other")).status_code == 404
        deadline = time.monotonic() + 20
        while service.service._held_bytes:  # what was sent is not held
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert post(service, request()).status_code == 200


def test_idle_connections_shut_nobody_out_for_long(impatient: Running):
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(impatient)) for _ in range(8)]
        with connect(impatient) as one_too_many:
            assert is_closed(one_too_many), "closed at once"
        scorer = impatient.scorer()
        view = TeacherView(np.array([1, 2, 3]), np.array([1, 2]), np.array([0, 1]))
        (signal,) = anyio.run(scorer.score, [view], SignalKind.SAMPLED)
        assert signal.logprobs is not None
        assert all(map(is_closed, idle))


# --- models that cannot be loaded


def test_a_load_that_failed_is_not_tried_again_for_every_request(monkeypatch: pytest.MonkeyPatch):
    lm, tried, broken = llama(), Counter[str](), True

    def load() -> Any:
        tried["a"] += 1
        time.sleep(0.05)
        if broken:
            raise ValueError(f"{SECRET_PATH} holds no weights")
        return lm

    with running(served(lm, load=load)) as service:
        with ThreadPoolExecutor(4) as threads:  # some wait for the same attempt
            answers = [threads.submit(post, service, request()) for _ in range(4)]
            for answer in answers:
                says = refused(answer.result(20), 500)
                assert re.search(r"could not be loaded \(ValueError\); the service's log.*60 s later", says)
        refused(ask(service, "GET", "/head?model=t"), 500)
        assert tried["a"] == 1
        broken = False
        refused(post(service, request()), 500)
        monkeypatch.setattr(hosting, "RETRY_S", 0.0)
        assert post(service, request()).status_code == 200
        assert tried["a"] == 2


def test_nothing_in_the_package_unpickles():
    found = set()
    for path in (Path(__file__).parents[2] / "models" / "teacher_service").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found |= {alias.name for alias in node.names} | {getattr(node, "module", None)}
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "np.load", "torch.save"):
                found.add(ast.unparse(node))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"):
                found.add(ast.unparse(node.func))
    assert not found & {"pickle", "marshal", "shelve", "dill", "torch.load", "np.load", "torch.save", "eval", "exec"}
