"""Teachers that are not in memory together: each is loaded when asked, in place of the one asked longest ago."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from errors import ModelError, ProtegeError
from models.causal_lm import CausalLM
from models.device_thread import compute
from models.heads import AtTemperature, LinearHead, take_head
from models.transformers_scorer import TransformersScorer
from models.types import Signal, SignalKind, SignalSpec, TeacherView

Loader = Callable[[], Sequence[CausalLM]]


class Shelf:
    """At most `limit` models at a time, each with the readings (`CausalLM`) that share it. For the device's thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, Sequence[CausalLM]] = OrderedDict()

    def lend(self, name: str, load: Loader) -> Sequence[CausalLM]:
        """The model of that name, loaded if it is not there. Raises what `load` raises."""
        if name not in self._kept:
            while len(self._kept) >= self._limit:
                self._kept.popitem(last=False)
            gc.collect()  # modules lie in cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._kept[name] = load()
        self._kept.move_to_end(name)
        return self._kept[name]


class OnDemandScorer:
    """`Scorer` of a model that `lend` gives, and may take back. Its head stays where whole distributions are asked for:
    the learner forms them later, teacher by teacher."""

    def __init__(self, name: str, lend: Callable[[], CausalLM], *, temperature: float, token_budget: int) -> None:
        self.name = name
        self.temperature = temperature
        self._lend = lend
        self._budget = token_budget
        self._head: AtTemperature | None = None

    async def score(self, views: Sequence[TeacherView], need: SignalSpec) -> list[Signal]:
        """One signal per view, in order. Raises `TeacherError`, and where the model cannot be loaded again, or its head
        cannot stay alone, `ModelError`: that ends the run and drops no episode."""
        return await compute(self._score, views, need)

    def _score(self, views: Sequence[TeacherView], need: SignalSpec) -> list[Signal]:
        try:
            lm = self._lend()
        except (ProtegeError, RuntimeError, OSError) as error:
            raise ModelError(f"teacher {self.name} could not be loaded again: {error}") from error
        scorer = TransformersScorer(self.name, lm, temperature=self.temperature, token_budget=self._budget)
        if need is not SignalKind.FULL:
            return scorer.score_now(views, need)
        if self._head is None:
            self._head = AtTemperature(self._take_head(lm), self.temperature)
        return [replace(signal, head=self._head) for signal in scorer.score_now(views, need)]

    def _take_head(self, lm: CausalLM) -> LinearHead:
        try:
            return take_head(lm)
        except ModelError as error:
            raise ModelError(
                f"teacher {self.name} cannot be put away while its distributions are in use ({error}): leave out "
                "teachers_in_memory"
            ) from error
