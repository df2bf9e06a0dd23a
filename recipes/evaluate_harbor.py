"""Run a model, or a task's own solution, over Harbor tasks, graded by their tests.

    python -m recipes.evaluate_harbor agent=oracle
    python -m recipes.evaluate_harbor model_name=./student dataset=./terminal-bench samples=4
    python -m recipes.evaluate_harbor model_name=Qwen/Qwen3-4B dataset=starter max_turns=20 sampler.url=http://host:8000

Prints the pass rate with its error, why episodes ended, and what they cost. Every attempt's transcript is
kept. Stop it whenever you like: the same command goes on with the attempts that are missing.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import anyio
import chz

from envs.grading import accuracy_with_error
from envs.harbor.attempt import Attempt
from envs.harbor.dataset import HarborDataset, row_of
from envs.harbor.sandboxes import DockerSandboxes, image_of
from envs.harbor.task import HarborTask
from envs.rendering import Renderer
from envs.rollout import derive_seed, run_group
from envs.types import Episode, StopReason
from errors import ConfigError, DataError, InfrastructureError, NoSignalError
from models.device_thread import compute_blocking
from models.types import Sampler
from recipes import engines, samplers, setup
from recipes.cli import run_cli
from recipes.config import TrainConfig
from recipes.harbor_setup import HarborOptions, check_lengths, group_builder, prepare_engine, sandboxes_of
from recipes.sampler_config import SamplerConfig, TransformersConfig, sampler_field
from training import signals
from training.atomic import dumps, write_atomic
from training.run_dir import Behavior, RunDir, open_run_dir

MAY_DIFFER = frozenset(
    {"behavior_if_log_dir_exists", "log_path", "max_sandboxes", "sampler", "sampler_slots", "device"}
)
PASSED = 1.0


@chz.chz
class Config(HarborOptions):
    """Evaluation of one model, or of the tasks themselves, on Harbor tasks."""

    agent: Literal["model", "oracle", "nop"] = chz.field(
        default="model", doc="model; oracle: the task's own solution; nop: nothing is done at all"
    )
    model_name: str | None = chz.field(default=None, doc="hub id, local folder (a checkpoint too) or .gguf file")
    load_checkpoint_path: str | None = chz.field(default=None, doc="weights to use instead: HF folder or adapter")
    samples: int = chz.field(default=1, doc="attempts at each task")
    temperature: float = chz.field(default=1.0, doc="of sampling; 0 is greedy")
    chat_template_kwargs: str = chz.field(default="{}", doc="JSON object for the chat template")
    sampler: SamplerConfig = sampler_field()
    sampler_slots: int = chz.field(default=64, doc="largest batch of concurrent generation")
    device: str = chz.field(default="auto", doc="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = chz.field(default="auto", doc="of the computation")
    seed: int = 0
    log_path: str | None = chz.field(default=None, doc="folder of the results; default: runs/evaluate_harbor-…")
    behavior_if_log_dir_exists: Behavior = chz.field(
        default="ask", doc="ask: go on with the same evaluation, ask (or fail) if options differ; resume; delete; raise"
    )

    @chz.validate
    def _check(self) -> None:
        if (self.agent == "model") != (self.model_name is not None):
            raise ConfigError(f"agent={self.agent}: model_name is for agent=model, which needs it")
        if self.agent != "model" and self.sampler != TransformersConfig():
            raise ConfigError(f"agent={self.agent} samples from no model: leave the sampler's options out")
        if self.samples < 1:
            raise ConfigError(f"samples={self.samples}: expected 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: expected 0 or more")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: expected 0 or more")
        if self.model_name is not None:
            self.as_training()

    def as_training(self) -> TrainConfig:
        """The same model as a training run would see it, which is how it is loaded and checked."""
        assert self.model_name is not None
        return TrainConfig(
            model_name=self.model_name,
            load_checkpoint_path=self.load_checkpoint_path,
            teacher_model=self.model_name,
            teacher_checkpoint=self.load_checkpoint_path,
            system_prompt=self.system_prompt or None,
            chat_template_kwargs=self.chat_template_kwargs,
            max_tokens=self.max_tokens,
            sampler=self.sampler,
            sampler_slots=self.sampler_slots,
            device=self.device,
            dtype=self.dtype,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Record:
    """One attempt that has ended. Without a reward it was dropped, for a reason of ours."""

    task: str
    attempt: int
    seconds: float
    reward: float | None = None
    stop_reason: str | None = None
    dropped: str | None = None
    cause: str | None = None
    sampled_tokens: int = 0
    total_tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()
    verifier_output: Sequence[str] = ()


Act = Callable[[HarborTask, int], Awaitable[Record]]


def main(config: Config) -> None:
    data = config.tasks(eval_size=0, seed=config.seed)
    if config.agent == "oracle":
        for task in data.tasks.values():
            if any(step.solution is None for step in task.steps):
                raise DataError(
                    f"{task.folder}: agent=oracle needs its solution/solve.sh. Leave it out with task_names"
                )
    models = None
    if config.agent == "model":
        models = setup.check_models(config.as_training(), tools=True)
        check_lengths(config, data, models)
    prepare_engine(data, config.sandbox_runtime)
    run_dir = open_run_dir(
        log_path(config), chz.asdict(config), config.behavior_if_log_dir_exists, may_differ=MAY_DIFFER
    )
    with run_dir:
        store = Store(run_dir.episodes_path / "step_000000.jsonl")  # the names of a run's own files
        lm = None if models is None else compute_blocking(_load, config, models)
        signals.run(_evaluate, config, data, models, lm, store, sandboxes_of(run_dir.path, config), run_dir.path)
        metrics = summary(list(store.records.values()))
        run_dir.truncate_metrics(-1)  # what an earlier part of this evaluation summed up
        run_dir.append_metrics({"step": 0, **metrics})
        print_summary(metrics, store, run_dir)
    if not metrics.get("graded"):
        raise NoSignalError(f"none of {len(store.records)} attempts could be graded; their causes are in {store.path}")


def log_path(config: Config) -> Path:
    if config.log_path is not None:
        return Path(config.log_path)
    who = Path(config.model_name).name if config.model_name else config.agent
    return Path("runs", "evaluate_harbor-" + re.sub(r"[^\w.-]+", "-", f"{Path(config.dataset).name}-{who}"))


def _load(config: Config, models: setup.CheckedModels):
    return engines.load_lm(config.as_training(), models, models.student, models.compute_dtype)


# --- the attempts


class Store:
    """Every attempt that has ended, one line each, as it ends. A line that a kill cut short is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[tuple[str, int], Record] = {}
        whole = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):  # other ends of lines stand inside texts
                try:
                    record = Record(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                self.records[record.task, record.attempt] = record
                whole.append(line + "\n")
            write_atomic(path, whole)

    def missing(self, data: HarborDataset, samples: int) -> list[tuple[HarborTask, int]]:
        """Attempts that are not there yet, or were dropped, sample by sample: early results cover all tasks."""
        return [
            (task, k)
            for k in range(samples)
            for task in data.tasks.values()
            if (done := self.records.get((task.task_id, k))) is None or done.dropped is not None
        ]

    def add(self, record: Record) -> None:
        self.records[record.task, record.attempt] = record
        with self.path.open("a", encoding="utf-8", errors="replace") as file:  # half a surrogate is no character
            file.write(dumps(vars(record)) + "\n")


async def _evaluate(
    config: Config,
    data: HarborDataset,
    models: setup.CheckedModels | None,
    lm: Any,
    store: Store,
    sandboxes: DockerSandboxes,
    folder: Path,
) -> None:
    missing = store.missing(data, config.samples)
    print(f"{len(missing)} of {len(data.tasks) * config.samples} attempts to make")
    if models is None:
        await _run_all(missing, store, lambda task, k: solve(config, task, k, sandboxes))
        return
    renderer = models.student_renderer
    made = samplers.make_sampler(config.as_training(), lm, renderer.tokenizer, servers=models.servers, folder=folder)
    async with samplers.sampling(made, lm) as sampler:
        await _run_all(missing, store, lambda task, k: play(config, data, task, k, renderer, sampler, sandboxes))


async def _run_all(missing: Sequence[tuple[HarborTask, int]], store: Store, act: Act) -> None:
    """All at once: how many have a sandbox is bounded where sandboxes are made."""
    total = len(missing)
    ended = 0

    async def one(task: HarborTask, k: int) -> None:
        nonlocal ended
        record = await act(task, k)
        store.add(record)
        ended += 1
        what = f"dropped ({record.dropped}: {record.cause})" if record.dropped else f"reward {record.reward:g}"
        print(f"[{ended}/{total}] {task.task_id} {k + 1}: {what}", flush=True)

    async with anyio.create_task_group() as tasks:
        for task, k in missing:
            tasks.start_soon(one, task, k)


async def solve(config: Config, task: HarborTask, k: int, sandboxes: DockerSandboxes) -> Record:
    """The task's own solution, or nothing at all, step by step."""
    started = time.monotonic()
    attempt: Attempt | None = None
    says: list[dict[str, Any]] = []
    stop = StopReason.COMPLETED
    try:
        image = await image_of(task, sandboxes)
        attempt = Attempt(task, image, sandboxes, config.settings(), graded=True)
        await attempt.open()
        started = time.monotonic()
        while True:
            step = await attempt.begin_step()
            if config.agent == "oracle":
                result = await attempt.solve()
                stop = StopReason.TIMEOUT if result is None else stop
                output = "" if result is None else result.stdout_text + result.stderr_text
                says.append({"role": "oracle", "step": step.name, "content": output})
            await attempt.grade()
            if not attempt.goes_on:
                break
        metrics: Counter[str] = Counter()
        for verdict in attempt.verdicts:
            metrics.update(verdict.metrics())  # type: ignore[arg-type]
        return Record(
            task.task_id, k, time.monotonic() - started, attempt.reward(cut_short=False), stop.value,
            messages=says, verifier_output=[v.output for v in attempt.verdicts], metrics=dict(metrics),
        )  # fmt: skip
    except InfrastructureError as error:
        return Record(task.task_id, k, time.monotonic() - started, dropped=error.reason, cause=str(error))
    finally:
        if attempt is not None:
            await attempt.close()


async def play(
    config: Config,
    data: HarborDataset,
    task: HarborTask,
    k: int,
    renderer: Renderer,
    sampler: Sampler,
    sandboxes: DockerSandboxes,
) -> Record:
    """The model's attempt, exactly as in training, but for the reward."""
    assert config.model_name is not None
    builder = group_builder(
        config, data, row_of(task), renderer=renderer, teacher=config.model_name,
        sandboxes=sandboxes, group_size=1, rewarded=True,
    )  # fmt: skip
    started = time.monotonic()
    seed = derive_seed(config.seed, task.task_id, k)
    group = await run_group(builder, sampler, temperature=config.temperature, seed=seed)
    seconds = time.monotonic() - started
    if not group.episodes:
        return Record(task.task_id, k, seconds, dropped=group.dropped[0], cause=group.causes[0])
    (episode,) = group.episodes
    return Record(
        task.task_id, k, seconds, episode.reward, episode.stop_reason.value,
        sampled_tokens=episode.num_sampled, total_tokens=len(episode), metrics=episode.metrics,
        messages=transcript(episode, renderer), verifier_output=episode.logs.get("verifier_output", ()),
    )  # fmt: skip


def transcript(episode: Episode, renderer: Renderer) -> list[dict[str, Any]]:
    """The prompt's messages, and each turn's text, as sampled, with what it was answered."""
    messages: list[dict[str, Any]] = [dict(message) for message in episode.prompt_messages]
    for turn in episode.turns:
        text = renderer.decode(episode.token_ids[turn.start : turn.end].tolist())
        messages.append({"role": "assistant", "content": text})
        messages += [dict(message) for message in turn.observation]
    return messages


# --- what came of it


def summary(records: Sequence[Record]) -> dict[str, float]:
    """Rates over graded attempts, with errors over tasks; then, as Harbor counts, over all attempts."""
    graded = [r for r in records if r.reward is not None]
    numbers: dict[str, float] = {"attempts": len(records), "graded": len(graded)}
    for reason, count in sorted(Counter(r.dropped for r in records if r.dropped is not None).items()):
        numbers[f"dropped/{reason}"] = count
    if not graded:
        return numbers
    tasks = [r.task for r in graded]
    passed = [float(r.reward or 0.0) >= PASSED for r in graded]
    numbers["pass_rate"], numbers["pass_rate_se"] = accuracy_with_error(passed, tasks)
    mean, error = accuracy_with_error([float(r.reward or 0.0) for r in graded], tasks)  # type: ignore[arg-type]
    numbers |= {"reward": mean, "reward_se": error, "pass_rate_of_all": sum(passed) / len(records)}
    kept = sum(ok and r.metrics.get("services_kept", 0) > 0 for ok, r in zip(passed, graded, strict=True))
    ended = sum(
        not ok and r.metrics.get("services", 0) > r.metrics.get("services_kept", 0)
        for ok, r in zip(passed, graded, strict=True)
    )
    numbers |= {"passes_beside_kept_services": kept} if kept else {}
    numbers |= {"failures_after_services_were_ended": ended} if ended else {}
    without = sum(not ok and r.metrics.get("artifacts_left_out", 0) > 0 for ok, r in zip(passed, graded, strict=True))
    numbers |= {"failures_with_artifacts_left_out": without} if without else {}
    for reason, count in sorted(Counter(r.stop_reason for r in graded).items()):
        numbers[f"stop/{reason}"] = count / len(graded)
    for name in ("sampled_tokens", "total_tokens", "seconds"):
        numbers[f"{name}_mean"] = sum(getattr(r, name) for r in graded) / len(graded)
    numbers["seconds_total"] = sum(r.seconds for r in records)
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def print_summary(metrics: Mapping[str, float], store: Store, run_dir: RunDir) -> None:
    for name, value in metrics.items():
        if not name.endswith("_se"):
            error = metrics.get(f"{name}_se")
            print(f"{name:28} {value:.4g}" + (f" ± {error:.4f}" if error is not None else ""))
    print(f"transcripts: {store.path}")
    print(f"numbers:     {run_dir.metrics_path}")


if __name__ == "__main__":
    run_cli(main, Config, argv=sys.argv[1:])
