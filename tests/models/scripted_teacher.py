"""An HTTP server in a thread that answers as `vllm serve` 0.32 does, with a real model's numbers, and fails as told.

The shapes of answers and errors were recorded from the real one.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from torch import Tensor

Fault = int | str | Callable[[dict[str, Any]], None]
"""What happens to one completion: a status, `hang`, `close` (no answer), or a change to the answer."""


@dataclass
class ScriptedTeacher:
    """`with ScriptedTeacher(…) as server:` listens on `server.url`; every request is in `requests`."""

    logits: Callable[[Sequence[int]], Tensor]  # [T, v] of a sequence
    vocab_size: int
    tokenizer: Any = None
    models: tuple[str, ...] = ("teacher",)
    root: str = "teacher"
    max_model_len: int = 512
    max_logprobs: int = 20
    token: str | None = None
    port: int = 0
    delay_s: float = 0.0
    faults: deque[Fault] = field(default_factory=deque)
    always: Fault | None = None  # what happens to every completion
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0

    def __enter__(self) -> ScriptedTeacher:
        script, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}"))

            def reply(self, body: Any) -> None:
                with lock:
                    script._now += 1
                    script.most_at_once = max(script.most_at_once, script._now)
                    script.requests.append((self.path, dict(self.headers), body))
                try:
                    answer = script._answer(self.path, self.headers.get("Authorization"), body)
                finally:
                    with lock:
                        script._now -= 1
                if answer is None:
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                status, value = answer
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

        self._stop = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions(self) -> list[dict[str, Any]]:
        """The bodies of the requests to score something."""
        return [body for path, _, body in self.requests if path == "/v1/completions"]

    def _answer(self, path: str, authorization: str | None, body: Any) -> tuple[int, Any] | None:
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"error": "Unauthorized"}
        if path == "/v1/models":
            card = {"root": self.root, "parent": None, "max_model_len": self.max_model_len}
            return 200, {"object": "list", "data": [{"id": name, **card} for name in self.models]}
        if body is None or path not in ("/v1/completions", "/tokenize", "/detokenize"):
            return 404, {"detail": "Not Found"}
        if body["model"] not in self.models:
            return _error(404, f"The model `{body['model']}` does not exist.")
        if path == "/tokenize" and self.tokenizer is not None:
            return 200, {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])}
        if path == "/detokenize" and self.tokenizer is not None:
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        return self._completion(body) if path == "/v1/completions" else (404, {"detail": "Not Found"})

    def _completion(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        ids, k = body["prompt"], body["prompt_logprobs"]
        if self.delay_s:
            time.sleep(self.delay_s)
        fault = self.faults.popleft() if self.faults else self.always
        if fault == "hang":
            self._stop.wait(20)
        if fault in ("hang", "close"):
            return None
        if isinstance(fault, int):
            return _error(fault, f"scripted {fault}")
        if k > self.max_logprobs:
            most = self.max_logprobs
            return _error(400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {most}")
        if (bad := max(ids)) >= self.vocab_size:
            return _error(400, f"Token id {bad} is out of vocabulary")
        if len(ids) + body["max_tokens"] > self.max_model_len:
            return _error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        rows: list[Any] = [None]
        logprobs = self.logits(ids).log_softmax(-1)
        for token, values in zip(ids[1:], logprobs[:-1], strict=True):
            order = values.argsort(descending=True).tolist()
            row = {token: (values[token].item(), order.index(token) + 1)}
            row |= {other: (values[other].item(), rank) for rank, other in enumerate(order[:k], 1)}
            rows.append(
                {
                    str(i): {"logprob": v if math.isfinite(v) else -9999.0, "rank": rank, "decoded_token": "?"}
                    for i, (v, rank) in row.items()
                }
            )
        answer = {"choices": [{"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": rows}]}
        if callable(fault):
            fault(answer)
        return 200, answer


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
