"""What a server must be and do before a run starts to use it, found out by asking it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx2
from transformers import PreTrainedTokenizerBase

from envs.types import SamplingParams, StopCondition
from errors import ConfigError, SamplerError
from models.vllm.engine import Transient, sampling_params
from models.vllm.server import ServerEngine, reason_of
from models.vllm.worker import EXTENSION

TEXT = "Ünïcode, 3.14159 + 2 = 5?\n\tdef f(x):  return x**2\n漢字 🙂"
COMMAND = "vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs --generation-config vllm"
"""Whose tokens are not text, and whose logprobs are of what was sampled from."""
UPDATABLE = f"VLLM_SERVER_DEV_MODE=1 {COMMAND}"
"""Whose weights can be replaced, too."""


@dataclass(frozen=True)
class NewWeights:
    """What a run is going to hand to its servers."""

    dtype: str
    lora_rank: int = 0
    tied: bool = False  # the head is the embedding
    transfer: str | None = None  # how tensors are handed over; None: in a folder


@dataclass(frozen=True)
class ServerFacts:
    url: str
    max_model_len: int
    takes_adapters: bool
    repacks: bool = False  # has our worker extension, which packs a head anew


@dataclass(frozen=True)
class Asked:
    """Servers, and as what they are asked. `option`: where the options name them, in messages."""

    urls: tuple[str, ...]
    token: str | None = field(default=None, repr=False)
    model: str | None = None  # by the servers' name for it; None: the one that they were started with
    option: str = "sampler.url"
    timeout_s: float = 1800.0  # of one turn
    patience_s: float = 30.0  # that all may be away


async def check_servers(
    asked: Asked, tokenizer: PreTrainedTokenizerBase, weights: NewWeights, *, dry_run: bool = False
) -> list[ServerFacts]:
    """Of servers that a run hands weights to. One that is paused is resumed, unless it is a dry run. Raises
    `ConfigError` for the first that cannot sample for it."""
    return [await _Server(asked, url, tokenizer).check(weights, dry_run=dry_run) for url in asked.urls]


async def check_serving(asked: Asked, tokenizer: PreTrainedTokenizerBase) -> list[ServerFacts]:
    """Of servers that are sampled from as they are. Raises `ConfigError` for the first that cannot."""
    return [await _Server(asked, url, tokenizer).check(None) for url in asked.urls]


class _Server:
    """One server under examination."""

    def __init__(self, asked: Asked, url: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._engine = ServerEngine(url, token=asked.token)
        self._where = f"{asked.option}={url}"
        self._model = {} if asked.model is None else {"model": asked.model}
        self._tokenizer = tokenizer

    async def check(self, weights: NewWeights | None, *, dry_run: bool = False) -> ServerFacts:
        """`weights`: that it is going to get; None: it keeps its own."""
        command = COMMAND if weights is None else UPDATABLE
        await self._engine.open()
        try:
            await self._check_alive(command)
            facts = await self._length() if weights is None else await self._facts(weights)
            if weights is not None:
                await self._resume(dry_run=dry_run)
            await self._check_tokenizer()
            await self._check_logprobs(command)
            return facts
        except (Transient, SamplerError) as error:
            raise ConfigError(f"{self._where}: {error}") from error
        finally:
            with anyio.CancelScope(shield=True):
                await self._engine.close()

    async def _check_alive(self, command: str) -> None:
        try:
            answer = await self._engine.get("/health")
        except Transient as error:
            raise ConfigError(f"{self._where}: {error}. Start it with: {command}") from error
        if answer.status_code != 200:
            raise ConfigError(f"{self._where}: no vLLM server answers there ({reason_of(answer)})")

    async def _length(self) -> ServerFacts:
        answer = await self._engine.get("/v1/models")
        self._refuse_token(answer)
        try:
            lengths = [int(card["max_model_len"]) for card in answer.json()["data"] if card.get("max_model_len")]
            return ServerFacts(self._engine.name, min(lengths), takes_adapters=False)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self._where}: no vLLM server answers there ({reason_of(answer)} for /v1/models), and nothing else "
                f"samples. Start one with: {COMMAND}"
            ) from error

    async def _facts(self, weights: NewWeights) -> ServerFacts:
        answer = await self._engine.get("/server_info?config_format=json")
        if answer.status_code != 200:
            await self._length()  # is it vLLM at all?
            raise ConfigError(
                f"{self._where}: its weights cannot be replaced ({reason_of(answer)} for /server_info). "
                f"Start it with VLLM_SERVER_DEV_MODE=1 in its environment: {UPDATABLE}"
            )
        try:
            info = answer.json()
            model: Mapping[str, Any] = info["vllm_config"]["model_config"]
            lora: Mapping[str, Any] | None = info["vllm_config"]["lora_config"]
            hot = bool(info["vllm_env"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"))
            own, length = str(model["dtype"]).removeprefix("torch."), int(model["max_model_len"])
            on_cpu = "cpu" in str(info["vllm_config"].get("device_config"))
            repacks = EXTENSION in str(info["vllm_config"].get("parallel_config"))
            transfer = (info["vllm_config"].get("weight_transfer_config") or {}).get("backend")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self._where}: its /server_info is not vLLM 0.32's ({error!r})") from error
        if own != weights.dtype:
            raise ConfigError(
                f"{self._where} computes in {own}, the student in {weights.dtype}: their logprobs would differ by "
                f"rounding alone. Start the server with --dtype {weights.dtype}, or set dtype={own}"
            )
        if weights.transfer is not None and transfer != weights.transfer:
            flag = f'--weight-transfer-config \'{{"backend": "{weights.transfer}"}}\''
            raise ConfigError(
                f"{self._where} takes new weights by {transfer or 'no transfer'}, and sampler.handover is "
                f"{weights.transfer}. Start it with {flag}, or leave sampler.handover out: it then reads a folder"
            )
        rank = weights.lora_rank
        takes = bool(rank and lora and hot and int(lora["max_lora_rank"]) >= rank)
        if on_cpu and weights.tied and not repacks:
            raise ConfigError(
                f"{self._where} computes on a CPU, where vLLM keeps a copy of a head that is the embedding too, and a "
                f"reload forgets it. Start it with --worker-extension-cls {EXTENSION}, and Protege installed beside it"
            )
        return ServerFacts(self._engine.name, length, takes, repacks)

    async def _resume(self, *, dry_run: bool) -> None:
        """A run that was killed while it handed weights over has left its server paused."""
        answer = await self._engine.get("/is_paused")
        if answer.status_code != 200:
            return
        try:
            paused = answer.json().get("is_paused")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{self._where}: its /is_paused is not vLLM's ({reason_of(answer)})") from error
        if not paused:
            return
        resume = f"curl -X POST {self._engine.name}/resume"
        if dry_run:
            raise ConfigError(
                f"{self._where}: it is paused, by a run that was killed or one that hands weights over, and a dry run "
                f"changes nothing. A run without dry_run resumes it, as does: {resume}"
            )
        answer = await self._engine.post("/resume", None)
        if answer.status_code != 200:
            raise ConfigError(
                f"{self._where}: it is paused and does not resume ({reason_of(answer)}). Start it again, or: {resume}"
            )

    async def _check_tokenizer(self) -> None:
        answer = await self._engine.post("/tokenize", {**self._model, "prompt": TEXT, "add_special_tokens": False})
        self._refuse_token(answer)
        try:
            theirs = answer.json()["tokens"]
        except (ValueError, KeyError, TypeError):
            theirs = reason_of(answer)
        ours = self._tokenizer.encode(TEXT, add_special_tokens=False)
        if theirs != ours:
            raise ConfigError(
                f"{self._where}: it tokenises a text into {str(theirs)[:60]}, the model here into "
                f"{str(ours)[:60]}: it serves another. Start it with the folder or hub id that is used here"
            )

    async def _check_logprobs(self, command: str) -> None:
        """At half the temperature, two logprobs of the distribution that is sampled from lie twice as far apart."""
        gaps = []
        for temperature in (1.0, 0.5):
            how = sampling_params(SamplingParams(1, StopCondition(frozenset()), temperature))
            body = {**self._model, "token_ids": [1, 2], "sampling_params": {**how, "logprobs": 4}}
            answer = await self._engine.post("/inference/v1/generate", body)
            self._refuse_token(answer)
            if answer.status_code == 403:
                raise ConfigError(f"{self._where}: {reason_of(answer)}. It must take and give token ids: {command}")
            if answer.status_code != 200:
                raise ConfigError(f"{self._where}: it refused to sample one token: {reason_of(answer)}")
            try:
                top = {entry["token_id"]: entry["logprob"] for entry in _steps(answer.json())[0]["top_logprobs"]}
                by_token = {token: value for token, value in top.items() if value > -100}
                gaps.append(by_token)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise ConfigError(f"{self._where}: it returns no logprobs ({error!r})") from error
        shared = sorted(gaps[0].keys() & gaps[1].keys(), key=lambda token: gaps[0][token])
        if len(shared) < 2:
            raise ConfigError(f"{self._where}: it gave logprobs of {len(shared)} tokens, not of 4")
        wide, narrow = (gap[shared[-1]] - gap[shared[0]] for gap in (gaps[1], gaps[0]))
        if abs(wide - 2 * narrow) > 0.05 * max(1.0, abs(2 * narrow)):
            raise ConfigError(
                f"{self._where}: its logprobs do not follow the temperature (a gap of {narrow:.3f} nats at 1, "
                f"{wide:.3f} at 0.5): they are not of the distribution that it samples from. Start it with "
                "--logprobs-mode processed_logprobs"
            )

    def _refuse_token(self, answer: httpx2.Response) -> None:
        if answer.status_code == 401:
            prefix = self._where.partition("url=")[0]
            raise ConfigError(
                f"{self._where}: it answers {reason_of(answer)}. Give its token (vLLM's --api-key) with "
                f"{prefix}token_env= or {prefix}token_file="
            )


def _steps(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return body["choices"][0]["logprobs"]["content"]
