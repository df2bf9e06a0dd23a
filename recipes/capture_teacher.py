"""Run a teacher once, and keep what it said: its likeliest tokens at every position, in a file.

    .venv/bin/python -m recipes.capture_teacher
    .venv/bin/python -m recipes.capture_teacher teacher_model=./teacher dataset=answers.jsonl top_k=32
    .venv/bin/python -m recipes.capture_teacher teacher_model=./teacher dataset=prompts.jsonl completions=teacher
    .venv/bin/python -m recipes.capture_teacher teacher.url=http://host:8000 sampler.url=http://host:8000 \
        dataset=prompts.jsonl completions=teacher
    .venv/bin/python -m recipes.capture_teacher teacher_model=./teacher model_name=./student completions=saved \
        episodes_path=runs/mine

`recipes.offline_distillation` trains from the file as often as you like, without the teacher. Stop a capture
whenever you like; the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio.to_thread
import chz

from envs.datasets import Dataset, Row, fingerprint
from envs.given import answer_ids, given_answer
from envs.rendering import tokenizer_fingerprint
from envs.sources import load_dataset_rows, locate
from envs.types import Episode
from errors import ConfigError, DataError
from models.device_thread import compute
from models.types import Sampler, Scorer, TeacherTopK
from models.vllm.preflight import Asked
from recipes import engines, samplers, setup
from recipes.cli import run_cli
from recipes.config import DEFAULT_TOP_K, TrainConfig
from recipes.sampler_config import SamplerConfig, TransformersConfig, sampler_field, servers_of
from recipes.teacher_answers import check_who_answered, sampled_answers
from recipes.teacher_options import OneTeacher
from recipes.teachers import refuse_ema
from training import signals
from training.capture import CaptureHeader, CaptureWriter, captured
from training.capture_files import check_suffix
from training.capture_files import writer as capture_writer
from training.saved_episodes import read_saved_episodes

BATCH = 32
"""Examples that are scored and written together: what a kill can cost."""
DEFAULT_MAX_TOKENS = 512


@chz.chz
class Config(OneTeacher):
    """One teacher over one dataset."""

    model_name: str | None = chz.field(
        default=None, doc="the student, in whose chat format the sequences are written; default: the teacher's own"
    )
    system_prompt: str | None = chz.field(default=None, doc="system message for rows that have none")
    chat_template_kwargs: str = chz.field(default="{}", doc="JSON object for the student's chat template")
    dataset: str = chz.field(default="arithmetic", doc="arithmetic, deepmath, tulu3, gsm8k, or a path to JSONL")
    dataset_path: str | None = chz.field(default=None, doc="a local copy of the named dataset: file or folder")
    max_rows: int | None = chz.field(default=None, doc="use at most this many training rows, or saved episodes")
    completions: Literal["given", "teacher", "saved"] = chz.field(
        default="given",
        doc="given: the rows' own answers; teacher: answers that the teacher samples; saved: episodes of a run",
    )
    episodes_path: str | None = chz.field(
        default=None, doc="completions=saved: the run's folder, or one file of its episodes"
    )
    max_tokens: int | None = chz.field(
        default=None, doc=f"completions=teacher: longest answer, in tokens; default {DEFAULT_MAX_TOKENS}"
    )
    sampler: SamplerConfig = sampler_field(
        ". For completions=teacher; servers must serve the teacher, and keep their weights"
    )
    top_k: int = chz.field(default=DEFAULT_TOP_K, doc="tokens kept at every position")
    temperature: float = chz.field(default=1.0, doc="of the teacher's logprobs and of its answers")
    output_path: str = chz.field(
        default="teacher_capture.jsonl", doc="the file to write, or to go on with; .safetensors is smaller"
    )
    device: str = chz.field(default="auto", doc="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = chz.field(default="auto", doc="of the computation")
    micro_batch_tokens: int | None = chz.field(
        default=None, doc="as in training; four times as many are scored at once"
    )
    seed: int = 0

    @chz.validate
    def _check(self) -> None:
        for name in ("top_k", "max_rows", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected 1 or more")
        if self.max_tokens is not None and self.completions != "teacher":
            raise ConfigError("max_tokens is of completions=teacher: other answers are as long as they are")
        if self.model_name is None and self.teacher_model is None:
            raise ConfigError(
                "missing: teacher_model\n  teacher_model=  (str), in whose format the sequences are written; with "
                "teacher.url, model_name= does as well\n--help lists every option"
            )
        self._check_sampler()
        saved = self.completions == "saved"
        if saved != (self.episodes_path is not None):
            raise ConfigError("completions=saved and episodes_path go together: give both, or neither")
        if saved and self.model_name is None:
            raise ConfigError("completions=saved needs model_name, the student that wrote the episodes")
        if saved and (self.dataset, self.dataset_path) != ("arithmetic", None):
            raise ConfigError(
                "completions=saved captures the episodes of episodes_path: leave dataset and dataset_path out"
            )
        check_suffix(self.output_path)
        if not Path(self.output_path).absolute().parent.is_dir():
            raise ConfigError(f"output_path={self.output_path}: its folder does not exist")
        refuse_ema(self.teacher_model)
        self.as_training()

    def _check_sampler(self) -> None:
        if self.completions != "teacher" and self.sampler != TransformersConfig():
            raise ConfigError(
                f"completions={self.completions} are not sampled: leave the sampler's options out, or set "
                "completions=teacher"
            )
        if self.completions == "teacher" and self.teacher.url and not servers_of(self.sampler):
            raise ConfigError(
                "completions=teacher samples from the teacher, whose weights are not here but at teacher.url: give "
                "sampler.url, a vLLM server that serves it (teacher.url itself, if it is one), or capture given or "
                "saved completions, or load the teacher"
            )

    def as_training(self) -> TrainConfig:
        """The same models as a training run would see them, which is how they are loaded and checked."""
        own_format = self.model_name is None
        return TrainConfig(
            model_name=self.model_name or self.teacher_model or "",
            load_checkpoint_path=self.teacher_checkpoint if own_format else None,
            teacher_model=self.teacher_model,
            teacher=self.teacher,
            objective="topk_forward_kl",
            top_k=self.top_k,
            teacher_checkpoint=self.teacher_checkpoint,
            system_prompt=self.system_prompt,
            teacher_system_prompt=self.teacher_system_prompt,
            chat_template_kwargs=self.chat_template_kwargs,
            teacher_chat_template_kwargs=self.teacher_chat_template_kwargs,
            temperature=self.temperature,
            device=self.device,
            dtype=self.dtype,
            micro_batch_tokens=self.micro_batch_tokens,
            sampler_slots=BATCH,
            sampler=TransformersConfig() if servers_of(self.sampler) else self.sampler,  # they are not the student's
            seed=self.seed,
        )


def presets(given: dict[str, str]) -> dict[str, Any]:
    dataset = given.get("dataset", "arithmetic")
    if given.get("completions") == "saved":
        return {}
    if dataset != "arithmetic":
        locate(dataset, given.get("dataset_path"))  # a typo is named here, not the options that it did not bring
        return {}
    longest = {"max_tokens": 24} if given.get("completions") == "teacher" else {}  # the models' context is small
    teacher = {} if "teacher.url" in given else {"teacher_model": "embedded:teacher"}
    return {**teacher, "max_rows": 2000, **longest}


def main(config: Config) -> None:
    checked = check(config)
    signals.run(_capture, config, checked)
    size = Path(config.output_path).stat().st_size
    header = checked.header
    print(f"{config.output_path}: {header.examples} examples, top {header.top_k}, {size / 2**20:.1f} MiB")
    print(f"train from it: python -m recipes.offline_distillation capture_path={config.output_path} model_name=…")


# --- what is checked before anything is loaded


@dataclass(frozen=True)
class Checked:
    rows: Sequence[Row]
    models: setup.CheckedModels
    header: CaptureHeader
    saved: Mapping[str, Episode]  # by row id; empty unless that is what is captured
    sampled_at: Asked | None = None  # servers that sample the teacher


def check(config: Config) -> Checked:
    """Every check that needs no weights. Raises `UserError`s."""
    training = config.as_training()
    if config.episodes_path is not None:
        found = read_saved_episodes(config.episodes_path)
        saved = {episode.row_id: episode for episode in found.episodes[: config.max_rows]}
        rows = [Row(name, tuple(episode.prompt_messages)) for name, episode in saved.items()]
        name, models = found.episodes[0].dataset, setup.check_models(training, tools=found.several_turns)
        found.check_spelling(config.episodes_path, models.student_renderer.tokenizer, config.model_name or "")
    else:
        data = _rows(config)
        name, rows, saved, models = data.name, data.train, {}, setup.check_models(training)
    header = _header(config, training, name, rows, models, saved)
    asked = samplers.asked_servers(config.sampler, config.teacher.served_model)
    if asked is not None:
        servers = samplers.check_teacher_servers(asked, models.only_teacher.renderer.tokenizer)
        length = min(server.max_model_len for server in servers)
        models = models.with_length(length, setup.server_limit(asked.urls[0], length))
    checked = Checked(rows, models, header, saved, asked)
    _check_lengths(config, checked)
    return checked


def _rows(config: Config) -> Dataset:
    data = load_dataset_rows(
        config.dataset, config.dataset_path, eval_size=0, seed=config.seed, max_rows=config.max_rows
    )
    setup.refuse_hints(data.train)
    for row in data.train:
        teacher = config.as_training().teacher_name
        if row.teacher not in (None, teacher):
            raise DataError(f"{row.place}: its teacher is {row.teacher!r}, this capture is of {teacher!r}")
        if config.completions == "given" and row.completion is None:
            raise DataError(f"{row.place}: has no completion. Give one, or let the teacher answer: completions=teacher")
    return data


def _header(
    config: Config,
    training: TrainConfig,
    dataset: str,
    rows: Sequence[Row],
    models: setup.CheckedModels,
    saved: Mapping[str, Episode],
) -> CaptureHeader:
    student, teacher = models.student_renderer, models.only_teacher
    made_from: list[Any] = [fingerprint(rows), teacher.renderer.fingerprint, config.completions]
    if config.completions == "teacher":
        made_from += [config.seed, _max_tokens(config)]
    for e in saved.values():
        made_from += [hashlib.sha256(e.token_ids.tobytes() + e.sampled.tobytes()).hexdigest(), e.turns, e.tools]
        made_from += [e.teacher_messages, e.teacher_hints]
    return CaptureHeader(
        teacher=training.teacher_name,
        weights=teacher.weights,
        tokenizer=tokenizer_fingerprint(student.tokenizer),
        format=student.fingerprint,
        top_k=config.top_k,
        temperature=training.comparison_temperature(),
        dtype="as served" if teacher.served is not None else samplers.dtype_name(models.compute_dtype),
        dataset=dataset,
        examples=len(rows),
        made_from=hashlib.sha256(repr(made_from).encode()).hexdigest(),
    )


def _check_lengths(config: Config, checked: Checked) -> None:
    limit = checked.models.context_length
    if limit is None:
        return
    student, teacher = checked.models.student_renderer, checked.models.only_teacher.renderer
    for row in checked.rows:
        if row.row_id in checked.saved:
            episode = checked.saved[row.row_id]
            length = max(len(episode), len(checked.models.only_teacher.views.view(episode).token_ids))
        else:
            prompts = [student.prompt(row.messages), teacher.prompt(row.teacher_messages or row.messages)]
            given = config.completions == "given"
            answer = len(answer_ids(student, row.completion or "")) if given else _max_tokens(config)
            length = max(map(len, prompts)) + answer
        if length > limit:
            raise DataError(
                f"{row.place}: {length} tokens with its answer; {checked.models.context_limit}. "
                "Shorten it or leave it out"
            )


def _max_tokens(config: Config) -> int:
    return config.max_tokens or DEFAULT_MAX_TOKENS


# --- the capture


async def _capture(config: Config, checked: Checked) -> None:
    with capture_writer(Path(config.output_path), checked.header) as writer:
        if len(writer.done) < checked.header.examples:
            await _write(config, checked, writer)


async def _write(config: Config, checked: Checked, writer: CaptureWriter) -> None:
    training, models = config.as_training(), checked.models
    teacher, sampler, lm = models.only_teacher, None, None
    if teacher.served is not None:
        scorer = teacher.served.make_scorer(teacher.name)
    else:
        lm = await compute(engines.load_teacher, training, models, teacher.source)
        scorer = engines.local_scorer(training, models, teacher.name, lm)
    if config.completions != "teacher":
        await _score_all(config, checked, writer, scorer, None)
        return
    tokenizer, folder = teacher.renderer.tokenizer, Path(config.output_path).absolute().parent
    if checked.sampled_at is not None:
        sampler, lm = samplers.make_serving_sampler(training, checked.sampled_at, tokenizer, folder=folder), None
    else:
        assert lm is not None  # refused of a teacher on a server
        sampler = samplers.make_teacher_sampler(training, lm, tokenizer, folder=folder)
    async with samplers.sampling(sampler, lm) as running:
        await _score_all(config, checked, writer, scorer, running)


async def _score_all(
    config: Config, checked: Checked, writer: CaptureWriter, scorer: Scorer, sampler: Sampler | None
) -> None:
    teacher, rows = checked.models.only_teacher, checked.rows
    # why: batches by position, not of what is left: a capture that went on then rounds like one that did not
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        if all(row.row_id in writer.done for row in batch):
            continue
        episodes = await _episodes(config, checked, batch, sampler)
        views = [teacher.views.view(episode) for episode in episodes]
        signals = await scorer.score(views, TeacherTopK(config.top_k))
        if checked.sampled_at is not None:
            check_who_answered(checked.sampled_at, episodes, views, signals)
        found = [captured(e, s) for e, s in zip(episodes, signals, strict=True) if e.row_id not in writer.done]
        await anyio.to_thread.run_sync(writer.append, found)
        print(f"{min(start + BATCH, len(rows))} of {len(rows)} examples")


async def _episodes(config: Config, checked: Checked, rows: Sequence[Row], sampler: Sampler | None) -> list[Episode]:
    if checked.saved:
        return [checked.saved[row.row_id] for row in rows]
    if config.completions == "teacher":
        assert sampler is not None
        episodes = await sampled_answers(
            rows,
            sampler,
            checked.models,
            dataset=checked.header.dataset,
            max_tokens=_max_tokens(config),
            temperature=config.temperature,
            seed=config.seed,
        )
        await sampler.sleep()
        return episodes
    header, renderer = checked.header, checked.models.student_renderer
    return [
        given_answer(row, renderer, dataset=header.dataset, teacher=header.teacher, max_length=sys.maxsize)
        for row in rows  # their lengths were checked
    ]


if __name__ == "__main__":
    run_cli(main, Config, presets=presets, argv=sys.argv[1:])
