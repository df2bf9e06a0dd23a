"""From options to the parts of a run, in two stages: `check` reads no weights, `build` loads them.

Everything that can be refused is refused by `check`, before a folder is made or a weight is read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from envs.datasets import Dataset, Row
from envs.prompt_only import PromptOnlyGroupBuilder
from envs.rendering import Renderer
from errors import ConfigError, DataError, ModelError
from models import attention
from models.adapters import adapter_bytes, add_lora, attach_adapter, check_base
from models.causal_lm import CausalLM
from models.checks import default_device
from models.cpu_matmul import use_fast_exact_matmul
from models.loading import load_config, load_model
from models.on_demand import OnDemandScorer, Shelf
from models.sources import ModelSource, check_source, context_length
from models.transformers_scorer import TransformersScorer
from models.types import Sampler, Scorer
from models.vllm.preflight import Asked, ServerFacts
from recipes import samplers
from recipes.sampler_config import VLLMConfig, check_handover, check_installed
from recipes.student_config import StudentConfig
from recipes.teacher_checks import check_teacher, renderer_for, student_source
from recipes.teachers import EMA, CheckedTeacher, by_base, by_weights, weights_fingerprint
from training.collect import Teacher
from training.evaluation import EvalSet
from training.learner import Learner
from training.weight_average import WeightAverage, average_of

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
    lengths += [server.max_model_len for server in servers]
    lengths += [config.sampler.max_model_len] if isinstance(config.sampler, VLLMConfig) else []
    limits = [(length, f"the models' context is {length} tokens") for length in lengths if length]
    limits += [(how.context_length, how.context_limit) for t in teachers.values() if (how := t.served) is not None]
    return min(limits, key=lambda limit: limit[0], default=(None, "the models have no longest context"))


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
            raise ConfigError(why)
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
        raise DataError(f"{data.name}: every prompt is longer than {limit} tokens")
    for split, all_rows, left in (("training", data.train, kept.train), ("held-out", data.test, kept.test)):
        if len(left) < len(all_rows):
            gone = len(all_rows) - len(left)
            logger.warning(
                "%s: left out %d of %d %s rows: prompts over %d tokens", data.name, gone, len(all_rows), split, limit
            )
    return kept


Lender = Callable[[], CausalLM]


@dataclass
class Engines:
    """Loaded models and what runs on them. Teachers of the same weights share one model and one scorer."""

    learner: Learner
    sampler: Sampler
    teachers: dict[str, Teacher]
    teacher_lms: dict[str, CausalLM]  # by the same names; of those that are in memory throughout
    lenders: Mapping[str, Lender]  # and of those that are loaded on demand
    exact: bool  # whether every teacher gives whole distributions

    def teacher_lm(self, name: str) -> CausalLM:
        """Of a teacher whose weights are loaded here, now if need be. For the device's thread."""
        return self.lenders[name]() if name in self.lenders else self.teacher_lms[name]


def build_engines(
    config: StudentConfig, models: CheckedModels, resume_from: Path | None, folder: Path | None = None
) -> Engines:
    """Load the weights, the student's from a checkpoint of this run if there is one. `folder`: of the run."""
    student = _trained_student(config, models, resume_from)
    average: WeightAverage | None = None
    lms: dict[str, CausalLM] = {}
    lenders: dict[str, Lender] = {}
    shelf = Shelf(models.teachers_at_a_time or len(models.teachers))
    for base, groups in by_base(models.teachers).items():
        firsts = [same[0] for same in groups]
        if base in models.on_demand:
            load = partial(_load_base, config, models, firsts)
            for i, same in enumerate(groups):
                lenders |= dict.fromkeys([teacher.name for teacher in same], partial(_lent, shelf, base, load, i))
            continue
        if firsts[0].ema_decay is not None:
            lm, average = average_of(student, firsts[0].ema_decay)
            found = [lm]
        elif base == models.shared_weights:
            found = _on_one_base(student, firsts)
        else:
            found = _load_base(config, models, firsts)
        lms |= {teacher.name: lm for lm, same in zip(found, groups, strict=True) for teacher in same}
    return assemble(config, models, student, lms, average, folder, lenders)


def _load_base(config: StudentConfig, models: CheckedModels, teachers: Sequence[CheckedTeacher]) -> Sequence[CausalLM]:
    """Raises `ModelError`, also for files that are no longer what was checked."""
    for teacher in teachers:
        if weights_fingerprint(teacher.source) != teacher.weights:
            raise ModelError("its files have changed since the run began")
    if len(teachers) == 1:
        return [load_teacher(config, models, teachers[0].source)]
    return _on_one_base(load_teacher(config, models, teachers[0].base_source), teachers)


def _lent(shelf: Shelf, base: str, load: Callable[[], Sequence[CausalLM]], place: int) -> CausalLM:
    return shelf.lend(base, load)[place]


def _on_one_base(host: CausalLM, teachers: Sequence[CheckedTeacher]) -> list[CausalLM]:
    """Teachers that are a model's base weights, or adapters on them."""
    names = [None if teacher.adapter_bytes is None else f"teacher{i}" for i, teacher in enumerate(teachers)]
    for teacher, name in zip(teachers, names, strict=True):
        if name is not None:
            assert teacher.source.checkpoint is not None
            host.model = attach_adapter(host.model, teacher.source.checkpoint, name)  # type: ignore[assignment]
    return [host.with_adapter(name) for name in names]


def assemble(
    config: StudentConfig,
    models: CheckedModels,
    student: CausalLM,
    teacher_lms: Mapping[str, CausalLM],
    average: WeightAverage | None = None,
    folder: Path | None = None,
    lenders: Mapping[str, Lender] | None = None,
) -> Engines:
    lenders = lenders or {}
    learner = Learner(
        student,
        optimizer=config.optimizer(),
        temperature=config.comparison_temperature(),
        token_budget=config.token_budget(models.device),
        reduction=config.loss_reduction,
        average=average,
        known_ids=_known_ids(models),
    )
    sampler = samplers.make_sampler(
        config, student, models.student_renderer.tokenizer, servers=models.servers, folder=folder
    )
    teachers: dict[str, Teacher] = {}
    for same in by_weights(models.teachers).values():
        name = " = ".join(teacher.name for teacher in same)
        lender = lenders.get(same[0].name)
        if same[0].served is not None:
            scorer = same[0].served.make_scorer(name)
        elif lender is not None:
            scorer = OnDemandScorer(name, lender, **_scorer_options(config, models))
        else:
            scorer = local_scorer(config, models, name, teacher_lms[same[0].name])
        teachers |= {teacher.name: Teacher(scorer, teacher.views, waits=lender is not None) for teacher in same}
    exact = all(teacher.exact for teacher in models.teachers.values())
    return Engines(learner, sampler, teachers, dict(teacher_lms), lenders, exact)


def _known_ids(models: CheckedModels) -> int | None:
    """How many ids the student's tokenizer has, where a teacher may speak of more: its own, or whose words a capture
    has. Embeddings are often wider than that."""
    more = not models.teachers or any(teacher.report.teacher_only_ids for teacher in models.teachers.values())
    return 1 + max(models.student_renderer.tokenizer.get_vocab().values()) if more else None


def local_scorer(config: StudentConfig, models: CheckedModels, name: str, lm: CausalLM) -> Scorer:
    return TransformersScorer(name, lm, **_scorer_options(config, models))


def _scorer_options(config: StudentConfig, models: CheckedModels) -> dict[str, Any]:
    budget = 4 * config.token_budget(models.device)  # nothing is kept for a backward pass
    return {"temperature": config.comparison_temperature(), "token_budget": budget}


def load_lm(config: StudentConfig, models: CheckedModels, source: ModelSource, dtype: torch.dtype) -> CausalLM:
    use_fast_exact_matmul()
    implementation = attention.implementation(config.attn_implementation)
    model = load_model(source, dtype=dtype, device=models.device, attn_implementation=implementation)
    _mend_generation_config(model)
    return CausalLM.verified(model, compute_dtype=models.compute_dtype)


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Older models carry a temperature without `do_sample`: they load, but `save_pretrained` refuses them."""
    settings = model.generation_config
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            settings.do_sample = True


def load_teacher(config: StudentConfig, models: CheckedModels, source: ModelSource) -> CausalLM:
    lm = load_lm(config, models, source, models.compute_dtype)
    lm.model.requires_grad_(False)
    return lm


def _trained_student(config: StudentConfig, models: CheckedModels, resume_from: Path | None) -> CausalLM:
    source, adapter = models.student, models.adapter
    if resume_from is not None and config.lora_rank:
        adapter = str(resume_from)
    elif resume_from is not None:
        source = ModelSource(source.name, str(resume_from))
    # Full fine-tuning keeps float32 weights: a bfloat16 weight is blind to steps below 1/256 of itself.
    lm = load_lm(config, models, source, models.compute_dtype if config.lora_rank else torch.float32)
    if config.lora_rank:  # after the comparison with the plain forward: LoRA changes neither trunk nor head
        lm.model = add_lora(lm.model, config.lora_rank, config.lora_alpha, adapter=adapter, seed=config.seed)  # type: ignore[assignment]
    if config.activation_checkpointing:
        no_dropout(lm.model)
        lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.model.train()
    return lm


def no_dropout(model: torch.nn.Module) -> None:
    """Training mode is needed for checkpointing, and must not add noise that the sampler did not have."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # dropout by function: the rate is an attribute, as in OPT
            if isinstance(value, float) and ("drop" in name):
                setattr(module, name, 0.0)


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
