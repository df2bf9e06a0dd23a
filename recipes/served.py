"""Teachers that servers hold: asked what they are, and whether they fit, before anything is loaded here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

import anyio
import chz
import httpx2
import torch

from errors import ConfigError
from models.checks import probe_view
from models.server_pool import Access, ServerPool
from models.teacher_view import ViewMaker
from models.types import Scorer, SignalKind, SignalSpec
from models.vllm import teacher_server as vllm
from models.vllm.scorer import VllmScorer
from recipes import own_service
from recipes.own_service import OBJECTIVES_WITHOUT_WHOLE_DISTRIBUTIONS, OwnService
from recipes.tokens import check_one_place, read_token
from recipes.urls import check_url

logger = logging.getLogger(__name__)
FIRST_ANSWER_S = 10.0


@chz.chz
class ServerOptions:
    """A teacher that servers hold, and not this machine."""

    url: tuple[str, ...] = chz.field(
        default=(),
        blueprint_cast=lambda text: tuple(url.strip() for url in text.split(",")),  # chz takes `url=` for no urls
        doc="address of `vllm serve` or recipes.serve_teacher; several that serve the same, by commas",
    )
    served_model: str | None = chz.field(default=None, doc="what the server calls it; default: its only model")
    token_env: str | None = chz.field(default=None, doc="environment variable that holds the server's token")
    token_file: str | None = chz.field(default=None, doc="file that holds the server's token")
    timeout_s: float = chz.field(default=300.0, doc="longest wait for one answer")
    patience_s: float = chz.field(default=60.0, doc="how long to go on trying servers that do not answer")

    @chz.validate
    def _server(self) -> None:
        for url in self.url:
            check_url(url, with_path=True)
        given = [name for name in _OF_A_SERVER if getattr(self, name) != chz.chz_fields(ServerOptions)[name]._default]
        if given and not self.url:
            raise ConfigError(f"{given[0]} is of a teacher on a server: give its url too, or leave it out")
        check_one_place(self.token_env, self.token_file)
        if not 0 < self.timeout_s < float("inf"):
            raise ConfigError(f"timeout_s={self.timeout_s}: expected a positive number")
        if not 0 <= self.patience_s < float("inf"):
            raise ConfigError(f"patience_s={self.patience_s}: expected 0 or more")

    def access(self, option: str = "") -> Access:
        """With the token, read now. `option`: what the options begin with. Raises `ConfigError`."""
        urls = tuple(url.rstrip("/").removesuffix("/v1") for url in self.url)
        token = read_token(self.token_env, self.token_file, prefix=option)
        return Access(urls, token, timeout_s=self.timeout_s, patience_s=self.patience_s)


_OF_A_SERVER = ("served_model", "token_env", "token_file", "timeout_s", "patience_s")


@dataclass(frozen=True)
class Served:
    """A teacher that was found on servers, and what it can do."""

    model: str  # what the servers call it, or were started with: the default of teacher_model
    urls: tuple[str, ...]
    context_length: int  # the longest sequence that it scores
    context_limit: str  # what sets that length, for errors
    exact: bool  # whether it gives whole distributions
    line: str  # what a dry run says of it, and config.json keeps
    make_scorer: Callable[[str], Scorer]  # from the teacher's name


async def find(access: Access, served_model: str | None, option: str) -> vllm.VllmServer | OwnService:
    """What answers at a teacher's address. Raises `ConfigError`."""
    for url in access.urls:
        await _check_that_it_answers(access, url, option)
    own = await own_service.find(access, served_model, option)
    return own or await vllm.describe(access, served_model, option)


async def _check_that_it_answers(access: Access, url: str, option: str) -> None:
    """Anything at all: a server says at once that it lives, while what comes later may take its time.

    Raises `ConfigError`. An address where nobody listens is named by what asks there next."""
    limit_s = min(FIRST_ANSWER_S, access.timeout_s)
    try:
        with anyio.fail_after(limit_s):
            async with ServerPool(access).client() as client, client.stream("GET", f"{url}/health"):
                pass
    except (TimeoutError, httpx2.TimeoutException):
        raise ConfigError(
            f"{option}url={url}: nothing was answered for {limit_s:g} s, not even to /health. The server is "
            "frozen, or something else is at that address: start it again, or correct the address"
        ) from None
    except httpx2.RequestError:
        pass


async def check_fit(
    found: vllm.VllmServer | OwnService,
    access: Access,
    *,
    name: str,
    option: str,
    maker: ViewMaker,
    need: SignalSpec,
    temperature: float,
    device: torch.device,
) -> Served:
    """Refuse what the server cannot give, then have it score a short text. Raises `ConfigError`,
    `TokenizerMismatchError`."""
    if isinstance(found, OwnService):
        fit = await own_service.check_fit(
            found, access, name=name, maker=maker, need=need, temperature=temperature, device=device
        )
        length = min(found.model.context_length or sys.maxsize, found.info.limits.request_tokens)
        return Served(
            model=found.model.name,
            urls=access.urls,
            context_length=length,
            context_limit=f"teacher {name} reads sequences of {length} tokens",
            exact=fit.why_not_whole is None,
            line=f"served by {access.urls[0]} as {found.model.name}; scored twice, it differs by {fit.gap:.2g} nats"
            + (f"; {fit.why_not_whole}" if fit.why_not_whole else ""),
            make_scorer=fit.make_scorer,
        )
    if need is SignalKind.FULL:
        raise ConfigError(
            f"the objective needs teacher {name}'s whole distributions, and {access.urls[0]} is a plain vLLM server, "
            f"which does not give them. It can serve {OBJECTIVES_WITHOUT_WHOLE_DISTRIBUTIONS}. Or serve the teacher "
            "with recipes.serve_teacher, which gives whole distributions"
        )
    tokenizer = maker.teacher.tokenizer
    scorer_of = _scorers(found, access, len(tokenizer), temperature)
    scorer_of(name)  # refuses a temperature
    unknown = await vllm.check_tokenizer(access, found, name, tokenizer, maker.teacher.name)
    if unknown:
        logger.warning(
            "teacher %s: %s. That its ids mean the same as those of %s is unconfirmed",
            name,
            unknown,
            maker.teacher.name,
        )
    gap = await vllm.probe(access, found, name, probe_view(maker), need, vocab_size=len(tokenizer), option=option)
    return Served(
        model=found.source,
        urls=access.urls,
        context_length=found.max_model_len - 1,
        context_limit=f"teacher {name}'s server scores sequences of {found.max_model_len - 1} tokens (its "
        "--max-model-len less the one that it must sample)",
        exact=False,
        line=f"served by {', '.join(access.urls)} as {found.model}; scored twice, it differs by {gap:.2g} nats"
        + (f"; {unknown}" if unknown else ""),
        make_scorer=scorer_of,
    )


def _scorers(found: vllm.VllmServer, access: Access, vocab_size: int, temperature: float) -> Callable[[str], Scorer]:
    return lambda name: VllmScorer(
        name, found.model, ServerPool(access), vocab_size=vocab_size, temperature=temperature
    )
