"""From options to the parts of a run, in two stages: `check` reads no weights, `build` loads them.

Everything that can be refused is refused by `check`, before a folder is made or a weight is read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from envs.datasets import Dataset, Row
from envs.prompt_only import PromptOnlyGroupBuilder
from envs.rendering import Renderer, make_renderer
from errors import ConfigError, DataError
from models import attention
from models.causal_lm import CausalLM
from models.checks import PairReport, check_pair, default_device
from models.cpu_matmul import use_fast_exact_matmul
from models.loading import (
    ModelSource,
    add_lora,
    check_source,
    estimate_memory,
    is_adapter,
    load_config,
    load_model,
    load_tokenizer,
    source_fingerprint,
)
from models.teacher_view import ViewMaker
from models.transformers_sampler import TransformersSampler
from models.transformers_scorer import TransformersScorer
from recipes import embedded
from recipes.config import TrainConfig
from training.collect import Teacher
from training.evaluation import EvalSet
from training.learner import Learner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedModels:
    """A student and a teacher that were found to fit, with nothing loaded but their tokenizers."""

    student: ModelSource
    adapter: str | None  # a saved LoRA adapter that the student goes on from
    teacher: ModelSource
    student_renderer: Renderer
    teacher_renderer: Renderer
    report: PairReport
    context_length: int | None  # of the shorter of the two
    device: torch.device
    compute_dtype: torch.dtype
    shares_base: bool  # LoRA on the very weights that the teacher is

    @property
    def views(self) -> ViewMaker:
        return ViewMaker(self.student_renderer, self.teacher_renderer)


def check_models(config: TrainConfig, *, tools: bool = False) -> CheckedModels:
    """Everything about the models that needs no weights; `tools`: episodes of several turns, with tools.

    Raises `UserError`s.
    """
    device = default_device(config.device)
    student, adapter = student_source(config)
    teacher = ModelSource(embedded.resolve(config.teacher_model), config.teacher_checkpoint)
    for source in (student, teacher):
        check_source(source)
    ours, theirs = config.student_template_kwargs(), config.teacher_template_kwargs()
    student_renderer = renderer_for(student, ours, config.system_prompt or None)
    system_prompt = config.system_prompt if config.teacher_system_prompt is None else config.teacher_system_prompt
    teacher_renderer = renderer_for(teacher, theirs, system_prompt or None)
    for renderer in (student_renderer, teacher_renderer):
        renderer.check(tools=tools, multi_turn=tools)
    return CheckedModels(
        student=student,
        adapter=adapter,
        teacher=teacher,
        student_renderer=student_renderer,
        teacher_renderer=teacher_renderer,
        report=check_pair(config.teacher_model, student_renderer, teacher_renderer),
        context_length=_context_length(student, teacher),
        device=device,
        compute_dtype=config.compute_dtype(device),
        shares_base=config.lora_rank > 0 and source_fingerprint(student) == source_fingerprint(teacher),
    )


def student_source(config: TrainConfig) -> tuple[ModelSource, str | None]:
    """Where the student's weights come from, and the adapter that LoRA training goes on from."""
    name = embedded.resolve(config.model_name)
    checkpoint = config.load_checkpoint_path
    if checkpoint is not None and config.lora_rank > 0 and is_adapter(checkpoint):
        check_source(ModelSource(name, checkpoint))
        return ModelSource(name), checkpoint
    return ModelSource(name, checkpoint), None


def renderer_for(source: ModelSource, kwargs: dict, system_prompt: str | None) -> Renderer:
    return make_renderer(
        load_tokenizer(source),
        chat_template_kwargs=kwargs,
        system_prompt=system_prompt,
        name=source.name,
        extra_stop_ids=_generation_stop_ids(source),
    )


def _generation_stop_ids(source: ModelSource) -> list[int]:
    try:
        ids = GenerationConfig.from_pretrained(str(Path(source.name).expanduser())).eos_token_id
    except (OSError, ValueError):  # it has none, as .gguf files do not
        return []
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _context_length(*sources: ModelSource) -> int | None:
    lengths = [getattr(load_config(s).get_text_config(), "max_position_embeddings", None) for s in sources]
    return min((length for length in lengths if length), default=None)


def check_prompt_lengths(
    data: Dataset, models: CheckedModels, *, max_tokens: int, max_prompt_tokens: int | None, drop: bool
) -> Dataset:
    """Refuse, or `drop`, rows whose prompt leaves no room for `max_tokens`. Raises `DataError`, `ConfigError`."""
    limit = max_prompt_tokens
    if models.context_length is not None:
        room = models.context_length - max_tokens
        if room < 1:
            raise ConfigError(f"max_tokens={max_tokens}: the models' context is {models.context_length} tokens")
        limit = room if limit is None else min(limit, room)
    if limit is None:
        return data

    # What a format adds by itself, a system prompt of its own included.
    added = {
        id(renderer): len(renderer.prompt([{"role": "user", "content": "?"}])) + 64
        for renderer in (models.student_renderer, models.teacher_renderer)
    }

    def too_long(row: Row) -> bool:
        for messages, renderer in (
            (row.messages, models.student_renderer),
            (row.teacher_messages or row.messages, models.teacher_renderer),
        ):
            # A token has at least one byte: most rows need no rendering to be seen to fit.
            size = sum(len(json.dumps(m, default=str)) + 16 for m in messages) + added[id(renderer)]
            if size > limit and (tokens := len(renderer.prompt(messages))) > limit:
                if not drop:
                    raise DataError(
                        f"{row.row_id}: its prompt has {tokens} tokens, the longest allowed is {limit} "
                        f"(max_tokens={max_tokens} and the models' context decide). "
                        "Shorten it, lower max_tokens, or set long_prompts=drop"
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


def memory_lines(config: TrainConfig, models: CheckedModels) -> list[str]:
    """What the run will hold, from shapes alone."""
    weights_dtype = models.compute_dtype if config.lora_rank else torch.float32
    student = estimate_memory(load_config(models.student), dtype=weights_dtype, lora_rank=config.lora_rank)
    lines = [f"student {name}: {_gib(size)}" for name, size in student.items() if name != "total"]
    total = student["total"]
    if models.shares_base:
        lines.append("teacher: shares the student's base weights")
    else:
        teacher = estimate_memory(load_config(models.teacher), dtype=models.compute_dtype, trained=False)["total"]
        lines.append(f"teacher parameters: {_gib(teacher)}")
        total += teacher
    lines.append(f"in all: {_gib(total)}, and activations of {config.token_budget(models.device)} tokens at a time")
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


@dataclass
class Engines:
    """Loaded models and what runs on them."""

    learner: Learner
    sampler: TransformersSampler
    teacher: Teacher
    teacher_lm: CausalLM


def build_engines(config: TrainConfig, models: CheckedModels, resume_from: Path | None) -> Engines:
    """Load the weights, the student's from a checkpoint of this run if there is one."""
    student = _trained_student(config, models, resume_from)
    teacher = student.without_adapter() if models.shares_base else load_teacher(config, models)
    return assemble(config, models, student, teacher)


def assemble(config: TrainConfig, models: CheckedModels, student: CausalLM, teacher: CausalLM) -> Engines:
    temperature = config.comparison_temperature()
    scorer = TransformersScorer(
        config.teacher_model,
        teacher,
        temperature=temperature,
        token_budget=4 * config.token_budget(models.device),  # nothing is kept for a backward pass
    )
    learner = Learner(
        student,
        optimizer=config.optimizer(),
        temperature=temperature,
        token_budget=config.token_budget(models.device),
        reduction=config.loss_reduction,
    )
    tokenizer = models.student_renderer.tokenizer
    sampler = TransformersSampler(student, tokenizer, slots=config.sampler_slots)
    return Engines(learner, sampler, Teacher(scorer, models.views), teacher)


def load_lm(config: TrainConfig, models: CheckedModels, source: ModelSource, dtype: torch.dtype) -> CausalLM:
    use_fast_exact_matmul()
    implementation = attention.NAME if config.attn_implementation == "auto" else config.attn_implementation
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


def load_teacher(config: TrainConfig, models: CheckedModels) -> CausalLM:
    teacher = load_lm(config, models, models.teacher, models.compute_dtype)
    teacher.model.requires_grad_(False)
    return teacher


def _trained_student(config: TrainConfig, models: CheckedModels, resume_from: Path | None) -> CausalLM:
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
    renderer: Renderer, dataset: str, teacher: str, *, group_size: int, max_tokens: int
) -> Callable[[Row], PromptOnlyGroupBuilder]:
    """How a row becomes `group_size` single-turn attempts."""
    return lambda row: PromptOnlyGroupBuilder(
        dataset=dataset,
        row_id=row.row_id,
        teacher=teacher,
        teacher_messages=row.teacher_messages,
        messages=row.messages,
        renderer=renderer,
        group_size=group_size,
        max_tokens=max_tokens,
    )


def eval_set(data: Dataset, renderer: Renderer, teacher: str, max_tokens: int) -> EvalSet:
    """Held-out rows, attempted under the same prompt and budget as in training."""

    def builder(row: Row, samples: int) -> PromptOnlyGroupBuilder:
        return group_builder(renderer, data.name, teacher, group_size=samples, max_tokens=max_tokens)(row)

    return EvalSet(data.name, data.test, data.grader, builder)
