"""Bytes on the wire and processor time per scored token, of three ways to send what a teacher says.

    python -m benchmarks.teacher_payload
    python -m benchmarks.teacher_payload answer_tokens=2048 rounds=5

JSON is what `vllm serve` gives for `prompt_logprobs`: an object per position, with rank and text of each token, for
the prompt too; TRL 1.16 reads this. TRL's binary form is that of its earlier server, `trl vllm-serve`: numpy
arrays in base64 in JSON, padded to the longest answer, made into lists on arrival. Ours is `models/teacher_service`.
All three encode and decode the same numbers here, in one process, without a network; HTTP's headers are not counted.
"""

from __future__ import annotations

import base64
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import chz
import numpy as np
import torch

from models.heads import from_raw, raw
from models.teacher_service.messages import (
    AnswerFields,
    HiddenDtype,
    Reading,
    RequestFields,
    ScoreAnswer,
    ScoreRequest,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from recipes.cli import run_cli


@chz.chz
class Config:
    """Sizes of one batch, which is one request."""

    sequences: int = 8
    prompt_tokens: int = 128
    answer_tokens: int = 512
    top_k: int = 20
    vocab_size: int = 151_936
    hidden_sizes: tuple[int, ...] = (896, 2048, 4096)
    rounds: int = chz.field(default=3, doc="times are medians of so many")
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """What a teacher found: rows of all answers, end to end."""

    ids: np.ndarray  # int64 [sequences, prompt + answer]
    logprobs: np.ndarray  # float32 [n]
    topk_ids: np.ndarray  # int32 [n, k]
    topk_logprobs: np.ndarray  # float32 [n, k]


@dataclass(frozen=True)
class Cost:
    request_bytes: float
    answer_bytes: float
    encode_us: float
    decode_us: float


def make_batch(c: Config, k: int, answer_tokens: int) -> Batch:
    """Random, but shaped like text: frequent ids, a peaked distribution, the sampled token usually among the k."""
    generator = np.random.default_rng(c.seed)
    n = c.sequences * answer_tokens

    def ids(*shape: int) -> np.ndarray:
        return np.minimum(generator.zipf(1.2, shape) + 100, c.vocab_size - 1)

    steps = generator.exponential(0.6, (n, k)).astype(np.float32)
    topk_logprobs = -np.cumsum(steps, axis=1, dtype=np.float32)
    topk_ids = (ids(n, k) % (c.vocab_size // k) * k + np.arange(k)).astype(np.int32)  # distinct in a row
    return Batch(ids(c.sequences, c.prompt_tokens + answer_tokens), topk_logprobs[:, 0].copy(), topk_ids, topk_logprobs)


# --- ours


def ours(c: Config, batch: Batch, need: str, hidden: int = 0, dtype: HiddenDtype = "bfloat16") -> Cost:
    length = batch.ids.shape[1]
    positions = np.arange(c.prompt_tokens, length)
    fields = RequestFields.model_validate(
        {"model": "Qwen3-8B", "weights": "0123456789abcdef", "need": need, "temperature": 1.0}
        | ({"k": c.top_k} if need == "topk" else {})
        | ({"hidden_dtype": dtype} if need == "full" else {})
    )
    request = ScoreRequest(fields, [Reading(row, positions) for row in batch.ids])
    n = request.scored
    arrays: dict[str, np.ndarray] = {"logprobs": batch.logprobs}
    if need == "topk":
        arrays |= {"topk_ids": batch.topk_ids, "topk_logprobs": batch.topk_logprobs}
    states = torch.randn(n, hidden, generator=torch.Generator().manual_seed(c.seed)) if need == "full" else None
    answered = AnswerFields(model=fields.model, weights=fields.weights, loaded="0" * 64, head="0" * 64)

    def encode() -> tuple[bytes, bytes]:
        sent = arrays if states is None else {"hidden": raw(states.to(getattr(torch, dtype)))}
        return encode_request(request), encode_answer(ScoreAnswer(answered, sent))

    def decode(messages: tuple[bytes, bytes]) -> object:
        asked = decode_request(bytearray(messages[0]), max_tokens=request.tokens)
        answer = decode_answer(bytearray(messages[1]), asked, hidden_size=hidden, vocab_size=c.vocab_size)
        return [from_raw(array) for array in answer.arrays.values()]

    return measured(c, n, encode, decode)


# --- JSON, as `vllm serve` writes it


def plain_json(c: Config, batch: Batch, answer_tokens: int) -> Cost:
    n, k = batch.topk_ids.shape
    texts = [f"tok{i % 997}"[: 2 + i % 6] for i in range(5000)]

    def encode() -> tuple[bytes, bytes]:
        rows = [
            {
                str(token): {"logprob": value, "rank": rank + 1, "decoded_token": texts[token % 5000]}
                for rank, (token, value) in enumerate(zip(ids, values, strict=True))
            }
            for ids, values in zip(batch.topk_ids.tolist(), batch.topk_logprobs.tolist(), strict=True)
        ]
        choices = []
        for i in range(c.sequences):
            answer = rows[i * answer_tokens : (i + 1) * answer_tokens]
            prompt = [None, *(rows[j % n] for j in range(c.prompt_tokens - 1))]  # the server knows no answer
            choices.append({"index": i, "text": " x", "finish_reason": "length", "prompt_logprobs": [*prompt, *answer]})
        asked = {"model": "m", "prompt": batch.ids.tolist(), "max_tokens": 1, "prompt_logprobs": k, "temperature": 1.0}
        return compact(asked), compact({"id": "cmpl-0", "object": "text_completion", "choices": choices})

    def decode(messages: tuple[bytes, bytes]) -> object:
        json.loads(messages[0])
        ids, values = np.zeros((n, k), np.int64), np.zeros((n, k), np.float32)
        at = 0
        for choice in json.loads(messages[1])["choices"]:
            for position in choice["prompt_logprobs"][c.prompt_tokens :]:
                ids[at] = [int(token) for token in position]
                values[at] = [entry["logprob"] for entry in position.values()]
                at += 1
        return torch.from_numpy(ids), torch.from_numpy(values)

    return measured(c, n, encode, decode)


# --- TRL's binary form


def trl_binary(c: Config, batch: Batch, answer_tokens: int) -> Cost:
    n, k = batch.topk_ids.shape
    shape = (c.sequences, answer_tokens, k)

    def encode() -> tuple[bytes, bytes]:
        def text(array: np.ndarray) -> str:
            return base64.b64encode(array.tobytes()).decode("ascii")

        asked = {
            "sequences": batch.ids.tolist(), "prompt_lengths": [c.prompt_tokens] * c.sequences, "top_logprobs": k,
            "temperature": 1.0, "response_format": "binary",
        }  # fmt: skip
        actual = batch.ids[:, c.prompt_tokens :].astype(np.int32)
        return compact(asked), compact(
            {
                "logprobs_b64": text(batch.topk_logprobs), "token_ids_b64": text(batch.topk_ids),
                "actual_logprobs_b64": text(batch.logprobs), "actual_token_ids_b64": text(actual),
                "shape": shape, "completion_lengths": [answer_tokens] * c.sequences,
            }
        )  # fmt: skip

    def decode(messages: tuple[bytes, bytes]) -> object:
        json.loads(messages[0])
        answer = json.loads(messages[1])

        def lists(name: str, dtype: Any, width: int) -> list:
            array = np.frombuffer(base64.b64decode(answer[name]), dtype).reshape(*shape[:2], width)
            return [row[:length].tolist() for row, length in zip(array, answer["completion_lengths"], strict=True)]

        return [
            torch.tensor(lists("logprobs_b64", np.float32, k)), torch.tensor(lists("token_ids_b64", np.int32, k)),
            torch.tensor(lists("actual_logprobs_b64", np.float32, 1)),
        ]  # fmt: skip

    return measured(c, n, encode, decode)


# --- measuring


def compact(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def measured(
    c: Config, n: int, encode: Callable[[], tuple[bytes, bytes]], decode: Callable[[tuple[bytes, bytes]], object]
) -> Cost:
    times: list[tuple[float, float]] = []
    messages = (b"", b"")
    for _ in range(c.rounds):
        start = time.perf_counter()
        messages = encode()
        between = time.perf_counter()
        decode(messages)
        times.append((between - start, time.perf_counter() - between))
    encode_s, decode_s = (statistics.median(t) for t in zip(*times, strict=True))
    sizes = [len(message) / n for message in messages]
    return Cost(sizes[0], sizes[1], 1e6 * encode_s / n, 1e6 * decode_s / n)


def main(c: Config) -> None:
    torch.set_num_threads(1)
    few = 2  # answer tokens of whole vocabularies in text: more would not fit
    one, top = make_batch(c, 1, c.answer_tokens), make_batch(c, c.top_k, c.answer_tokens)
    whole = chz.replace(c, sequences=1, prompt_tokens=1, rounds=1)
    rows: list[tuple[str, Cost]] = [
        ("sampled, JSON", plain_json(c, one, c.answer_tokens)),
        ("sampled, TRL's binary form", trl_binary(c, one, c.answer_tokens)),
        ("sampled, ours", ours(c, one, "sampled")),
        (f"top {c.top_k}, JSON", plain_json(c, top, c.answer_tokens)),
        (f"top {c.top_k}, TRL's binary form", trl_binary(c, top, c.answer_tokens)),
        (f"top {c.top_k}, ours", ours(c, top, "topk")),
        ("whole vocabulary, JSON", plain_json(whole, make_batch(whole, c.vocab_size, few), few)),
        ("whole vocabulary, TRL's binary form", trl_binary(whole, make_batch(whole, c.vocab_size, few), few)),
        *((f"whole vocabulary, ours, H={h}", ours(c, one, "full", h)) for h in c.hidden_sizes),
        *((f"the same in float32, H={h}", ours(c, one, "full", h, "float32")) for h in c.hidden_sizes[:1]),
    ]
    print_table(rows)
    for h in c.hidden_sizes:
        cost = dict(rows)[f"whole vocabulary, ours, H={h}"]
        head_mb = 2 * c.vocab_size * h / 1e6
        size = cost.request_bytes + cost.answer_bytes
        print(f"H={h}: {size:.0f} bytes, 2H + 64 is {2 * h + 64}; the head, once: {head_mb:.0f} MB in bfloat16")


def print_table(rows: Sequence[tuple[str, Cost]]) -> None:
    print("| per scored token | request, bytes | answer, bytes | encode, us | decode, us |\n|---|---|---|---|---|")
    for name, cost in rows:
        values = (cost.request_bytes, cost.answer_bytes, cost.encode_us, cost.decode_us)
        print(f"| {name} | " + " | ".join(f"{value:,.1f}" for value in values) + " |")


if __name__ == "__main__":
    run_cli(main, Config)
