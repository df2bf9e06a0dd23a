"""What a server must be and do before a run starts to use it, found out by asking it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from transformers import PreTrainedTokenizerBase

from envs.types import SamplingParams, StopCondition
from errors import ConfigError, SamplerError
from models.vllm.engine import Transient, sampling_params
from models.vllm.server import ServerEngine, reason_of

TEXT = "Ünïcode, 3.14159 + 2 = 5?\n\tdef f(x):  return x**2\n漢字 🙂"
COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs "
    "--generation-config vllm"
)
"""Whose weights can be replaced, whose tokens are not text, and whose logprobs are of what was sampled from."""


@dataclass(frozen=True)
class ServerFacts:
    url: str
    max_model_len: int
    takes_adapters: bool


async def check_servers(
    urls: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, dtype: str, lora_rank: int = 0
) -> list[ServerFacts]:
    """Raises `ConfigError` for the first server that cannot sample for this run."""
    return [await _check_server(url, tokenizer, dtype, lora_rank) for url in urls]


async def _check_server(url: str, tokenizer: PreTrainedTokenizerBase, dtype: str, lora_rank: int) -> ServerFacts:
    server = ServerEngine(url)
    await server.open()
    try:
        await _check_alive(server)
        facts = await _facts(server, dtype, lora_rank)
        await _check_tokenizer(server, tokenizer)
        await _check_logprobs(server)
        return facts
    except (Transient, SamplerError) as error:
        raise ConfigError(f"sampler.url={url}: {error}") from error
    finally:
        with anyio.CancelScope(shield=True):
            await server.close()


async def _check_alive(server: ServerEngine) -> None:
    try:
        answer = await server.get("/health")
    except Transient as error:
        raise ConfigError(f"sampler.url: {error}. Start it with: {COMMAND}") from error
    if answer.status_code != 200:
        raise ConfigError(f"sampler.url={server.name}: no vLLM server answers there ({reason_of(answer)})")


async def _facts(server: ServerEngine, dtype: str, lora_rank: int) -> ServerFacts:
    answer = await server.get("/server_info?config_format=json")
    if answer.status_code != 200:
        raise ConfigError(
            f"sampler.url={server.name}: its weights cannot be replaced ({reason_of(answer)} for /server_info). "
            f"Start it with VLLM_SERVER_DEV_MODE=1 in its environment: {COMMAND}"
        )
    try:
        info = answer.json()
        model: Mapping[str, Any] = info["vllm_config"]["model_config"]
        lora: Mapping[str, Any] | None = info["vllm_config"]["lora_config"]
        hot = bool(info["vllm_env"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"))
        own, length = str(model["dtype"]).removeprefix("torch."), int(model["max_model_len"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"sampler.url={server.name}: its /server_info is not vLLM 0.32's ({error!r})") from error
    if own != dtype:
        raise ConfigError(
            f"sampler.url={server.name} computes in {own}, the student in {dtype}: their logprobs would differ by "
            f"rounding alone. Start the server with --dtype {dtype}, or set dtype={own}"
        )
    takes = bool(lora_rank and lora and hot and int(lora["max_lora_rank"]) >= lora_rank)
    return ServerFacts(server.name, length, takes)


async def _check_tokenizer(server: ServerEngine, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = await server.post("/tokenize", {"prompt": TEXT, "add_special_tokens": False})
    theirs = answer.json().get("tokens") if answer.status_code == 200 else None
    ours = tokenizer.encode(TEXT, add_special_tokens=False)
    if theirs != ours:
        raise ConfigError(
            f"sampler.url={server.name}: it tokenises a text into {str(theirs)[:60]}, the student into "
            f"{str(ours)[:60]}: it serves another model. Start it with the student's folder or hub id"
        )


async def _check_logprobs(server: ServerEngine) -> None:
    """At half the temperature, two logprobs of the distribution that is sampled from lie twice as far apart."""
    gaps = []
    for temperature in (1.0, 0.5):
        how = sampling_params(SamplingParams(1, StopCondition(frozenset()), temperature))
        body = {"token_ids": [1, 2], "sampling_params": {**how, "logprobs": 4}}
        answer = await server.post("/inference/v1/generate", body)
        if answer.status_code == 403:
            raise ConfigError(
                f"sampler.url={server.name}: {reason_of(answer)}. It must take and give token ids: {COMMAND}"
            )
        if answer.status_code != 200:
            raise ConfigError(f"sampler.url={server.name}: it refused to sample one token: {reason_of(answer)}")
        try:
            top = {entry["token_id"]: entry["logprob"] for entry in _steps(answer.json())[0]["top_logprobs"]}
            by_token = {token: value for token, value in top.items() if value > -100}
            gaps.append(by_token)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ConfigError(f"sampler.url={server.name}: it returns no logprobs ({error!r})") from error
    shared = sorted(gaps[0].keys() & gaps[1].keys(), key=lambda token: gaps[0][token])
    if len(shared) < 2:
        raise ConfigError(f"sampler.url={server.name}: it gave logprobs of {len(shared)} tokens, not of 4")
    wide, narrow = (gap[shared[-1]] - gap[shared[0]] for gap in (gaps[1], gaps[0]))
    if abs(wide - 2 * narrow) > 0.05 * max(1.0, abs(2 * narrow)):
        raise ConfigError(
            f"sampler.url={server.name}: its logprobs do not follow the temperature (a gap of {narrow:.3f} nats at 1, "
            f"{wide:.3f} at 0.5): they are not of the distribution that it samples from. Start it with "
            "--logprobs-mode processed_logprobs"
        )


def _steps(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return body["choices"][0]["logprobs"]["content"]
