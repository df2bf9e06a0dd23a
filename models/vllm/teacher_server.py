"""What a plain `vllm serve` says of itself, and whether it fits: asked before any weights are loaded.

Every check ends in one sentence that names both sides and the way out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from errors import ConfigError, TeacherError, TokenizerMismatchError
from models.byte_alignment import PROBE_TEXT
from models.checks import BATCHED_REPEAT_TOLERANCE
from models.server_pool import Access, Refused, ServerPool, Unanswered
from models.types import SignalKind, SignalSpec, TeacherTopK, TeacherView
from models.vllm.scorer import NO_LOGPROBS, VllmScorer

_IDS_AT_A_TIME = 32768


@dataclass(frozen=True)
class VllmServer:
    """One model, on one or several servers."""

    model: str  # what requests call it
    source: str  # the hub id or folder that it was loaded from
    max_model_len: int  # of the server with the least; prompt and one more token must fit

    @property
    def identity(self) -> str:
        return self.source


async def describe(access: Access, served_model: str | None, option: str) -> VllmServer:
    """What the servers serve: `served_model`, or the only model that they have. Raises `ConfigError`, which names
    the option's prefix."""
    cards = [await _card(replace(access, urls=(url,)), served_model, option) for url in access.urls]
    first = cards[0]
    for url, card in zip(access.urls, cards, strict=True):
        if card.model != first.model:
            raise ConfigError(
                f"{option}url: {access.urls[0]} serves {first.model}, {url} serves {card.model}. Give servers of one "
                f"model, or name it: {option}served_model="
            )
    return replace(first, max_model_len=min(card.max_model_len for card in cards))


async def _card(access: Access, served_model: str | None, option: str) -> VllmServer:
    (url,) = access.urls
    answer = await ask_one(access, "/v1/models", None, option)
    try:
        cards = {card["id"]: card for card in answer["data"]}
        name = served_model
        if name is None:
            name, *others = [name for name, card in cards.items() if card.get("parent") is None]
            if others:
                raise ConfigError(
                    f"{option}url={url} serves {', '.join(cards)}: say which is the teacher, {option}served_model="
                )
        if name not in cards:
            raise ConfigError(
                f"{option}served_model={served_model}: {url} serves {', '.join(cards)}. Name one of these, or start "
                "the server with that model"
            )
        # An adapter's card knows no length, and its root is a path.
        base = cards.get(cards[name].get("parent"), cards[name])
        return VllmServer(name, base.get("root") or name, int(base["max_model_len"]))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ConfigError(
            f"{option}url={url}: what answers there is no `vllm serve` (its /v1/models lists no model with a "
            "max_model_len). Give the address of one, or of recipes.serve_teacher"
        ) from None


async def ask_one(access: Access, path: str, body: dict[str, Any] | None, option: str) -> Any:
    """The JSON that the one server of `access` answers, asked once. Raises `ConfigError`; `Refused` for what is not
    about its address or token."""
    (url,) = access.urls
    pool = ServerPool(replace(access, timeout_s=min(access.timeout_s, 60.0), patience_s=0.0))
    try:
        async with pool.client() as client:
            return json.loads(await pool.ask(client, path, body))
    except Unanswered as error:
        raise ConfigError(
            f"{option}url={url}: nothing usable answers there ({error}). Start the server, wait until it has loaded "
            "its model, or correct the address"
        ) from error
    except Refused as error:
        if error.status in (401, 403):
            raise ConfigError(
                f"{option}url={url}: the server wants a token, or another one ({error.reason}). Name the variable or "
                f"file that holds it: {option}token_env= or {option}token_file="
            ) from error
        if body is not None:
            raise
        raise ConfigError(f"{option}url={url}: {error}. Expected the address of a server of a teacher") from error
    except ValueError as error:
        raise ConfigError(f"{option}url={url}: answers {path} with what is no JSON") from error


async def check_tokenizer(
    access: Access, server: VllmServer, name: str, tokenizer: PreTrainedTokenizerBase, tokenizer_name: str
) -> str | None:
    """Every id of `tokenizer` must mean the same text to the servers. Returns why that could not be found out, if so.

    Raises `TokenizerMismatchError`."""
    where = f"its tokenizer is {tokenizer_name}'s (teacher_model), but {server.model} is served"
    for url in access.urls:
        one = replace(access, urls=(url,))
        try:
            body = {"model": server.model, "prompt": PROBE_TEXT, "add_special_tokens": False}
            theirs = (await ask_one(one, "/tokenize", body, ""))["tokens"]
            ours = tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
            ids = sorted(tokenizer.get_vocab().values())
            different = None
            for start in range(0, len(ids), _IDS_AT_A_TIME):
                part = ids[start : start + _IDS_AT_A_TIME]
                if different is None and await _text(one, server, part) != tokenizer.decode(part):
                    different = await _first_different(one, server, tokenizer, part)
        except (Refused, ConfigError, LookupError, TypeError) as error:
            return f"{url} cannot say which tokenizer it has ({error})"
        if different is not None:
            raise TokenizerMismatchError(
                f"teacher {name}: {where} at {url}, and id {different[0]} is {different[1]!r} to the first and "
                f"{different[2]!r} to the second. Give the teacher_model that is served, or serve another"
            )
        if ours != theirs:
            raise TokenizerMismatchError(
                f"teacher {name}: {where} at {url}, and they split text differently. Give the teacher_model that is "
                "served, or serve another"
            )
    return None


async def _text(access: Access, server: VllmServer, ids: list[int]) -> str:
    answer = await ask_one(access, "/detokenize", {"model": server.model, "tokens": ids}, "")
    return answer["prompt"]


async def _first_different(
    access: Access, server: VllmServer, tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> tuple[int, str, str] | None:
    """By halves: an id, what it is here, and what it is there. None: alone, it is the same."""
    while len(ids) > 1:
        half = ids[: len(ids) // 2]
        ids = half if await _text(access, server, half) != tokenizer.decode(half) else ids[len(half) :]
    ours, theirs = str(tokenizer.decode(ids)), await _text(access, server, ids)
    return None if ours == theirs else (ids[0], ours, theirs)


async def probe(
    access: Access, server: VllmServer, name: str, view: TeacherView, need: SignalSpec, *, vocab_size: int, option: str
) -> float:
    """Have every server score one view, the first twice, with the top k that `need` asks for. Returns by how much
    the answers differ at most, in nats. Raises `ConfigError`."""
    k = min(need.k if isinstance(need, TeacherTopK) else 1, vocab_size)
    answers = []
    for url in (access.urls[0], *access.urls):
        one = replace(access, urls=(url,), patience_s=0.0)
        scorer = VllmScorer(name, server.model, ServerPool(one), vocab_size=vocab_size)
        try:
            (signal,) = await scorer.score([view], TeacherTopK(k))
        except TeacherError as error:
            raise ConfigError(f"{option}url={url}: {error}{_way_out(str(error), k, need)}") from error
        assert signal.logprobs is not None and signal.topk_logprobs is not None
        # The k likeliest of v tokens have at least k/v of the mass. Logits need not; twice as many for a padded head.
        if (signal.topk_logprobs.double().exp().sum(1) < k / (2 * vocab_size)).any():
            raise ConfigError(f"{option}url={url}: teacher {name}'s server gave no usable logprobs: {NO_LOGPROBS}")
        answers.append(signal.logprobs)
    gaps = [float((answer - answers[0]).abs().max()) for answer in answers[1:]]
    for url, gap in zip(access.urls, gaps, strict=True):
        if not gap <= BATCHED_REPEAT_TOLERANCE:
            how = "scored one sequence twice and differs" if url == access.urls[0] else "differs from the first server"
            raise ConfigError(
                f"{option}url={url}: teacher {name} {how} by {gap:.3g} nats, more than {BATCHED_REPEAT_TOLERANCE}: its "
                "signal is noise. Serve the same weights everywhere, unquantised or in another --dtype"
            )
    return max(gaps)


def _way_out(message: str, k: int, need: SignalSpec) -> str:
    if "max allowed" not in message:
        return ""
    lower = f", or lower top_k={k}" if isinstance(need, TeacherTopK) else ""
    return f". Start the server with --max-logprobs {k}{lower}"


def unavailable(need: SignalSpec) -> str | None:
    """What a plain vLLM server cannot give of what an objective needs; None if it can."""
    return "the teacher's whole distributions" if need is SignalKind.FULL else None
