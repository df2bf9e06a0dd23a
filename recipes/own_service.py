"""A teacher on our own service, `python -m recipes.serve_teacher`: found, checked, and made a scorer of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from envs.rendering import tokenizer_fingerprint
from errors import ConfigError, TeacherError
from models.checks import BATCHED_REPEAT_TOLERANCE, REPEAT_TOLERANCE, probe_view
from models.server_pool import Access
from models.teacher_service.client import RemoteScorer, describe
from models.teacher_service.fit import check_fit as check_service
from models.teacher_service.fit import find_model
from models.teacher_service.messages import ModelInfo, ServiceInfo
from models.teacher_view import ViewMaker
from models.types import SignalKind, SignalSpec

OBJECTIVES_WITHOUT_WHOLE_DISTRIBUTIONS = (
    "objective=reverse_kl, objective=topk_forward_kl, objective=jsd or objective=kd with support=teacher_topk, and "
    "objective=jsd with support=sampled"
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """What was found out about a model of a service that can be the teacher."""

    make_scorer: Callable[[str], RemoteScorer]  # from its name
    gap: float  # nats, between two scorings of a short text
    why_not_whole: str | None  # None: it gives whole distributions


@dataclass(frozen=True)
class OwnService:
    """One model of a service."""

    info: ServiceInfo
    model: ModelInfo

    @property
    def source(self) -> str | None:
        """Its hub id. A service names no folders of its own."""
        return self.model.source

    @property
    def identity(self) -> str:
        return self.model.weights


async def find(access: Access, served_model: str | None, option: str) -> OwnService | None:
    """None where nothing answers, or something else. Raises `ConfigError`."""
    url, *others = access.urls
    try:
        info = await describe(url, access.token, wait_s=0.0)
    except TeacherError:
        return None
    except ConfigError as error:
        raise ConfigError(f"{option}url={url}: {error}. See {option}token_env= and {option}token_file=") from error
    if info is None:
        return None
    if others:
        raise ConfigError(f"{option}url={','.join(access.urls)}: of recipes.serve_teacher, give one address")
    try:
        return OwnService(info, find_model(info, served_model, url))
    except ConfigError as error:
        raise ConfigError(f"{option}url={url}: {error}. Name one: {option}served_model=") from error


async def check_fit(
    found: OwnService,
    access: Access,
    *,
    name: str,
    maker: ViewMaker,
    need: SignalSpec,
    temperature: float,
    device: torch.device,
) -> Fit:
    """Have the model score a short text, and ask whether it gives whole distributions. Raises `ConfigError`,
    `TokenizerMismatchError`."""
    (url,) = access.urls
    check_service(
        found.info,
        found.model,
        url=url,
        tokenizer=tokenizer_fingerprint(maker.teacher.tokenizer),
        tokenizer_name=maker.teacher.name,
        need=need,
        temperature=temperature,
    )

    def make(called: str) -> RemoteScorer:
        return RemoteScorer(
            called, url, found.info, found.model.name, temperature=temperature, token=access.token, device=device,
            wait_s=access.patience_s, deadline_s=max(access.timeout_s, access.patience_s),
        )  # fmt: skip

    view, scorer = probe_view(maker), make(name)
    try:
        first, second = [(await scorer.score([view], SignalKind.SAMPLED))[0].logprobs for _ in range(2)]
        why_not_whole = await scorer.why_not_whole()
    except TeacherError as error:
        raise ConfigError(f"url={url}: {error}") from error
    assert first is not None and second is not None
    allowed = REPEAT_TOLERANCE if found.model.dtype == "float32" else BATCHED_REPEAT_TOLERANCE
    if not (gap := float((first - second).abs().max())) <= allowed:
        raise ConfigError(
            f"url={url}: teacher {name} scored one sequence twice and differs by {gap:.3g} nats, more than "
            f"{allowed:g}: its signal is noise"
        )
    if why_not_whole is not None:
        if need is SignalKind.FULL:
            raise ConfigError(
                f"the objective needs teacher {name}'s whole distributions, and {url} says: {why_not_whole}. It can "
                f"serve {OBJECTIVES_WITHOUT_WHOLE_DISTRIBUTIONS}"
            )
        logger.warning(
            "teacher %s: %s. What is measured of it is the KL of sampled tokens, not the exact one", name, why_not_whole
        )
    return Fit(make, gap, why_not_whole)
