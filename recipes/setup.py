"""From options to models and rows that were found to fit, and to the attempts that rows become. No weights are read:
what can be refused is refused here, before a folder is made. `recipes/engines.py` loads what was checked."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from envs.datasets import Dataset, Row
from envs.prompt_only import PromptOnlyGroupBuilder
from envs.rendering import Renderer
from errors import ConfigError, DataError
from models import attention
from models.adapters import adapter_bytes, check_base
from models.checks import default_device
from models.loading import load_config
from models.sources import ModelSource, check_source, context_length
from models.vllm.preflight import Asked, ServerFacts
from recipes import samplers
from recipes.sampler_config import VLLMConfig, check_handover, check_installed
from recipes.student_config import StudentConfig
from recipes.teacher_checks import check_teacher, renderer_for, student_source
from recipes.teachers import EMA, CheckedTeacher, by_base, weights_fingerprint
from training.evaluation import EvalSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedModels:
    """A student and its teachers that were found to fit, with nothing loaded but their tokenizers."""

    student: ModelSource
    adapter: str | None  # a saved LoRA adapter that the student goes on from
    student_renderer: Renderer
    teachers: Mapping[str, CheckedTeacher]
    context_length: int | None  # of the shortest of them all
    context_limit: str  # a sentence that says so, for errors
    device: torch.device
    compute_dtype: torch.dtype
    shared_weights: str | None  # a LoRA student's base: a teacher of these weights is not loaded again
    blends: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by name, the members' weights
    servers: tuple[ServerFacts, ...] = ()  # that sample the student
    sampled_at: Mapping[str, Asked] = field(default_factory=dict)  # by name, where teachers on servers are sampled
    teachers_at_a_time: int | None = None  # of those with weights of their own; None: all

    @property
    def on_demand(self) -> frozenset[str]:
        """The bases that are not always in memory, because there are too many of them."""
        bases = by_base(self.teachers)
        own = [b for b, groups in bases.items() if b != self.shared_weights and groups[0][0].ema_decay is None]
        few = self.teachers_at_a_time is None or len(own) <= self.teachers_at_a_time
        return frozenset() if few else frozenset(own)

    def with_length(self, length: int, limit: str) -> CheckedModels:
        """Where something reads no more than `length` tokens: `limit` says what."""
        if self.context_length is not None and self.context_length <= length:
            return self
        return replace(self, context_length=length, context_limit=limit)

    def readers(self, name: str) -> list[CheckedTeacher]:
        """The teacher of that name, or those of the blend."""
        return [self.teachers[member] for member in self.blends.get(name, (name,))]

    @property
    def only_teacher(self) -> CheckedTeacher:
        """Of a run that has one."""
        (teacher,) = self.teachers.values()
        return teacher

    @property
    def teacher_renderer(self) -> Renderer:
        """Of a run that has one teacher."""
        return self.only_teacher.renderer


def check_models(config: StudentConfig, *, tools: bool = False) -> CheckedModels:
    """Everything about the models that needs no weights; `tools`: episodes of several turns, with tools.

    Raises `UserError`s.
    """
    device = default_device(config.device)
    check_installed(config.sampler)
    check_handover(config.sampler, device, lora_rank=config.lora_rank)
    attention.implementation(config.attn_implementation)
    student, adapter = student_source(config)
    check_source(student)
    student_renderer = renderer_for(student, config.student_template_kwargs(), config.system_prompt or None)
    student_renderer.check(tools=tools, multi_turn=tools)
    specs = config.teacher_specs()
    if adapter is not None and any(spec.ema_decay is not None for spec in specs):
        _check_can_be_averaged(ModelSource(student.name, adapter))
    teachers = {spec.name: check_teacher(config, spec, student_renderer, tools=tools) for spec in specs}
    read = [ModelSource(student.name, adapter) if adapter else student, *(t.source for t in teachers.values())]
    for source in dict.fromkeys(read):
        check_base(source)
    blends = config.blends()
    for name, weights in blends.items():
        if foreign := next((member for member in weights if teachers[member].report.by_bytes), None):
            raise ConfigError(
                f"teacher {foreign} has another tokenizer, and the blend {name!r} mixes distributions over one "
                "vocabulary. Route rows to it instead, or give it blend_weight=0"
            )
    servers = samplers.check_student_servers(config, student, student_renderer.tokenizer, device)
    sampled_at = samplers.check_sampled_teachers(config, specs, teachers)
    context_length, context_limit = _context(config, student, teachers, servers)
    return CheckedModels(
        student=student,
        adapter=adapter,
        student_renderer=student_renderer,
        teachers=teachers,
        context_length=context_length,
        context_limit=context_limit,
        device=device,
        compute_dtype=config.compute_dtype(device),
        shared_weights=weights_fingerprint(student) if config.lora_rank and teachers else None,
        blends=blends,
        servers=servers,
        teachers_at_a_time=config.teachers_at_a_time(),
        sampled_at=sampled_at,
    )


def _check_can_be_averaged(adapter: ModelSource) -> None:
    if adapter_bytes(adapter) is None:
        raise ConfigError(
            f"teacher_model={EMA}: adapter {adapter.checkpoint} has more than LoRA on linear layers (embeddings, "
            "biases), of which there is no second copy on one base. Merge it into its base, or start a new one"
        )


def _context(
    config: StudentConfig,
    student: ModelSource,
    teachers: Mapping[str, CheckedTeacher],
    servers: Sequence[ServerFacts],
) -> tuple[int | None, str]:
    """The longest sequence that all of them read, and what sets it."""
    sources = [student, *(teacher.source for teacher in teachers.values() if teacher.served is None)]
    lengths = [context_length(load_config(source)) for source in sources]
    limits = [(length, f"the models' context is {length} tokens") for length in lengths if length]
    limits += [(s.max_model_len, server_limit(s.url, s.max_model_len)) for s in servers]
    if isinstance(config.sampler, VLLMConfig) and (length := config.sampler.max_model_len) is not None:
        limits.append((length, f"sampler.max_model_len={length}"))
    limits += [(how.context_length, how.context_limit) for t in teachers.values() if (how := t.served) is not None]
    return min(limits, key=lambda limit: limit[0], default=(None, "the models have no longest context"))


def server_limit(url: str, length: int) -> str:
    """In words, what a vLLM server reads."""
    return f"{url} reads {length} tokens, its --max-model-len"


def refuse_hints(rows: Sequence[Row]) -> None:
    """Raises `DataError` for hints on the way where there is no way: in episodes of one turn."""
    for row in rows:
        if row.teacher_hints:
            raise DataError(
                f"{row.place}: has teacher_hints, which come after a turn, and here an episode is one turn. "
                "Say it in teacher_messages, or use an environment of several turns (recipes.tool_env)"
            )


def check_prompt_lengths(
    data: Dataset,
    models: CheckedModels,
    *,
    teacher_of: Callable[[Row], str] | None,
    max_tokens: int | None,
    asked: tuple[int | None, str] = (None, ""),
    drop: bool | None,
) -> Dataset:
    """Refuse, or `drop`, rows whose prompt is too long, the student's or (if any) its teacher's: one that leaves no
    room for `max_tokens`, or is longer than `asked`, so many tokens (None: any) by the option that is given in words.

    `max_tokens` and `drop` are None where the recipe has no such option. Raises `DataError`, for hints too, and
    `ConfigError`."""
    refuse_hints([*data.train, *data.test])
    longest, option = asked
    limits = [] if longest is None else [(longest, option, f"raise {option.partition('=')[0]}")]
    if models.context_length is not None:
        room = models.context_length - (max_tokens or 1)
        why = f"{'' if max_tokens is None else f'max_tokens={max_tokens}: '}{models.context_limit}"
        if room < 1:
            raise ConfigError(
                f"{why}, which leaves no room for a prompt" + (". Lower max_tokens" if max_tokens else "")
            )
        limits.append((room, why, "" if max_tokens is None else "lower max_tokens"))
    if not limits:
        return data
    limit, why, way_out = min(limits, key=lambda limit: limit[0])
    ways_out = [*filter(None, [way_out]), *(["set long_prompts=drop"] if drop is not None else [])]

    # What a format adds by itself, a system prompt of its own included.
    added = {
        id(renderer): len(renderer.prompt([{"role": "user", "content": "?"}])) + 64
        for renderer in (models.student_renderer, *(teacher.renderer for teacher in models.teachers.values()))
    }

    def too_long(row: Row) -> bool:
        reads = [(row.messages, models.student_renderer)]
        if teacher_of is not None:
            judges = models.readers(teacher_of(row))
            reads += [(row.teacher_messages or row.messages, judge.renderer) for judge in judges]
        for messages, renderer in reads:
            # A token has at least one byte: most rows need no rendering to be seen to fit.
            size = sum(len(json.dumps(m, default=str)) + 16 for m in messages) + added[id(renderer)]
            if size > limit and (tokens := len(renderer.prompt(messages))) > limit:
                if not drop:
                    raise DataError(
                        f"{row.place}: its prompt has {tokens} tokens, the longest allowed is {limit} ({why}). "
                        f"Shorten it, or {', or '.join(ways_out)}"
                    )
                return True
        return False

    kept = replace(
        data, train=[r for r in data.train if not too_long(r)], test=[r for r in data.test if not too_long(r)]
    )
    if data.train and not kept.train:
        ways = ways_out[:1] if way_out else ["shorten them"]
        raise DataError(f"{data.name}: every prompt is longer than {limit} tokens ({why}): {ways[0]}")
    for split, all_rows, left in (("training", data.train, kept.train), ("held-out", data.test, kept.test)):
        if len(left) < len(all_rows):
            gone = len(all_rows) - len(left)
            logger.warning(
                "%s: left out %d of %d %s rows: prompts over %d tokens", data.name, gone, len(all_rows), split, limit
            )
    return kept


def group_builder(
    renderer: Renderer, dataset: str, teacher_of: Callable[[Row], str], *, group_size: int, max_tokens: int
) -> Callable[[Row], PromptOnlyGroupBuilder]:
    """How a row becomes `group_size` single-turn attempts, judged by the teacher that `teacher_of` names."""
    return lambda row: PromptOnlyGroupBuilder(
        dataset=dataset,
        row_id=row.row_id,
        teacher=teacher_of(row),
        teacher_messages=row.teacher_messages,
        messages=row.messages,
        renderer=renderer,
        group_size=group_size,
        max_tokens=max_tokens,
    )


def eval_set(data: Dataset, renderer: Renderer, teacher_of: Callable[[Row], str], max_tokens: int) -> EvalSet:
    """Held-out rows, attempted under the same prompt and budget as in training."""

    def builder(row: Row, samples: int) -> PromptOnlyGroupBuilder:
        return group_builder(renderer, data.name, teacher_of, group_size=samples, max_tokens=max_tokens)(row)

    return EvalSet(data.name, data.test, data.grader, builder)
