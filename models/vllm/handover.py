"""New weights for engines that keep a copy: in the run's folder, or from memory to memory, and proven there."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from envs.types import SamplingParams, StopCondition
from errors import ProtegeError
from models.device_thread import compute
from models.types import WeightSource
from models.vllm.engine import Engine, Transient
from models.vllm.pool import Member

PROBE = "Weights that were handed over must say the same here as there: 2 + 2 = "
LONGEST_PROMPT, PROBE_TOKENS = 32, 16  # any context has room for them
UPDATE_S, PROOF_S = 1800.0, 300.0  # an engine that takes longer has frozen
ALLOWED = {"float32": 1e-3, "bfloat16": 0.2}
"""Largest mean difference over `PROBE_TOKENS` tokens, in nats, of an engine's logprobs from the learner's that is
rounding. In bfloat16 sixteen tokens of a 135M model differed by 0.04 on average, by 0.07 at most (docs/results.md).
A false alarm would come again whenever the run is resumed; other weights differ by far more, or by their label."""


@dataclass(frozen=True)
class Model:
    """What all engines of a run have in common."""

    folder: Path  # of the run: weights lie in it while they are handed over
    tokenizer: PreTrainedTokenizerBase
    dtype: str  # of the computation: float32 or bfloat16


@dataclass(frozen=True)
class Handed:
    label: str  # of the engines' own weights, which they give back with every answer
    adapter: str | None  # the adapter to ask for; None where the engines' own weights are the learner's


class Handover:
    """`run` is in every label: two runs that use one server find each other out."""

    def __init__(self, model: Model, temperature: float, run: str) -> None:
        self._model = model
        self._temperature = temperature
        self._run = run
        self._base = f"protege-{run}-base"  # label of the weights that adapters are put on
        self._sending = anyio.Lock()  # a transfer holds a copy of the weights, and buffers on the device
        self._adapters: list[tuple[str, Path]] = []  # the last ones, as requests in flight still use them

    def version_of(self, labels: Sequence[str], adapter: str | None) -> int | None:
        """Of the weights that drew an answer's first token, from its `labels`; None if somebody else's drew any."""
        if adapter is not None:
            return self._version(adapter) if set(labels) == {self._base} else None
        versions = [self._version(label) for label in labels]
        return None if None in versions else versions[0]

    def _version(self, label: str) -> int | None:
        run, _, version = label.rpartition("-")
        return int(version) if run == f"protege-{self._run}" and version.isdigit() else None

    async def to(self, members: Sequence[Member], source: WeightSource, version: int) -> Handed:
        """Engines that are gone are taken out. Raises `ProtegeError` if one that is there has not got the weights."""
        label = f"protege-{self._run}-{version}"
        adapter = label if source.has_adapter and all(m.engine.takes_adapters for m in members) else None
        folder, kept = self._model.folder / f".tmp-{label}", False
        try:
            await self._start(members, source, folder / "base", with_adapter=adapter is None)
            if adapter is not None:
                await self._give_base(members, source, folder / "base")
                await self._drop_older(members)
                await self._write(source.save_adapter, folder / "adapter")
            elif not all(member.engine.takes_tensors for member in members):
                await self._write(source.save, folder / "model")
            async with anyio.create_task_group() as tasks:
                for member in members:
                    if member.down is None:
                        tasks.start_soon(self._give, member, folder, label, adapter, source)
            kept = adapter is not None  # vLLM may read an adapter again
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            await _remove(folder / "base" if kept else folder)
        if adapter is not None:
            self._adapters.append((adapter, folder))
        return Handed(label if adapter is None else self._base, adapter)

    async def clean(self) -> None:
        for _, folder in self._adapters:
            await _remove(folder)

    async def _start(
        self, members: Sequence[Member], source: WeightSource, folder: Path, *, with_adapter: bool
    ) -> None:
        """Engines in this process begin with the first weights that there are."""
        for member in members:
            if not member.engine.started:
                await self._write(source.save if with_adapter else source.save_base, folder)
                await anyio.to_thread.run_sync(self._model.tokenizer.save_pretrained, folder)
                await member.engine.start(folder, self._base)

    async def _give_base(self, members: Sequence[Member], source: WeightSource, folder: Path) -> None:
        """An adapter is worth nothing on the weights of another model or run: servers get those that it is made for."""

        async def give(member: Member) -> None:
            async with _giving(member):
                with anyio.fail_after(UPDATE_S):
                    await member.engine.wake()
                    await member.engine.reload(folder, self._base)

        without = []
        for member in members:
            if member.down is None:
                async with _giving(member):
                    if await member.engine.label() != self._base:
                        without.append(member)
        if without:
            await self._write(source.save_base, folder)
            async with anyio.create_task_group() as tasks:
                for member in without:
                    tasks.start_soon(give, member)

    async def _give(self, member: Member, folder: Path, label: str, adapter: str | None, source: WeightSource) -> None:
        async with _giving(member):
            async with self._sending if member.engine.takes_tensors else nullcontext():
                with anyio.fail_after(UPDATE_S):
                    await member.engine.wake()
                    if adapter is not None:
                        await member.engine.load_adapter(folder / "adapter", adapter)
                    elif member.engine.takes_tensors:
                        await member.engine.transfer(source, label)
                    else:
                        await member.engine.reload(folder / "model", label)
            with anyio.fail_after(PROOF_S):
                await self._prove(member.engine, label, adapter, source)
            member.unproven = False

    async def _prove(self, engine: Engine, label: str, adapter: str | None, source: WeightSource) -> None:
        """Raises `ProtegeError` unless what the engine samples is as likely under the learner's weights as it says."""
        prompt = self._model.tokenizer.encode(PROBE, add_special_tokens=False)[:LONGEST_PROMPT]
        how = SamplingParams(PROBE_TOKENS, StopCondition(frozenset()), self._temperature, seed=1)
        answer = await engine.generate(prompt, how, adapter)
        of_learner = await compute(source.logprobs, [*prompt, *answer.token_ids], self._temperature)
        pairs = list(zip(answer.logprobs, of_learner[len(prompt) - 1 :], strict=True))
        difference = sum(abs(a - b) for a, b in pairs) / len(pairs)
        allowed = ALLOWED[self._model.dtype]
        if answer.labels != (label if adapter is None else self._base,) or not difference <= allowed:
            mine, theirs = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            raise ProtegeError(
                f"{engine.name} did not take the weights {label!r}: it says {', '.join(answer.labels)!r}, and gives "
                f"{len(pairs)} probed tokens a mean logprob of {mine:.4f} where the learner gives {theirs:.4f} "
                f"(mean difference {difference:.2g}, allowed for {self._model.dtype}: {allowed:g}). Is it another "
                "model, another number type, or not started with --logprobs-mode processed_logprobs? "
                "The run can be resumed"
            )

    async def _drop_older(self, members: Sequence[Member]) -> None:
        """All adapters but the last, whose requests may still be in flight."""
        older, self._adapters = self._adapters[:-1], self._adapters[-1:]
        for name, folder in older:
            for member in members:
                try:
                    if member.down is None and await member.engine.has_adapter(name):
                        await member.engine.drop_adapter(name)
                except Transient as error:  # as in `_give`
                    member.take_out(str(error))
            await _remove(folder)

    async def _write(self, save: Callable[[Path], None], folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            await compute(save, folder)
        except (OSError, SafetensorError) as error:
            raise ProtegeError(
                f"the weights for vLLM could not be written to {folder}: {error}. Make room for one copy of the model "
                "there, or give another log_path; the run can be resumed"
            ) from error


@asynccontextmanager
async def _giving(member: Member) -> AsyncIterator[None]:
    """An engine that is gone meanwhile is taken out, and gets its weights when it is back, at the next update."""
    member.unproven = True  # also after an error: the label is set before the proof, and tells nothing of it
    try:
        yield
    except (Transient, TimeoutError) as error:
        why = str(error) or f"{member.engine.name} froze"
        member.take_out(f"{why}, while it took new weights")
    except BaseException:
        member.take_out(f"{member.engine.name} took new weights that were not proven")
        raise


async def _remove(folder: Path) -> None:
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))
