"""Loads the models that `recipes/setup.py` has checked, and makes the engines of a run of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from errors import ModelError
from models import attention
from models.adapters import add_lora, attach_adapter
from models.causal_lm import CausalLM
from models.cpu_matmul import use_fast_exact_matmul
from models.loading import load_model
from models.on_demand import OnDemandScorer, Shelf
from models.sources import ModelSource
from models.transformers_scorer import TransformersScorer
from models.types import Sampler, Scorer
from recipes import samplers
from recipes.setup import CheckedModels
from recipes.student_config import StudentConfig
from recipes.teachers import CheckedTeacher, by_base, by_weights, weights_fingerprint
from training.collect import Teacher
from training.learner import Learner
from training.weight_average import WeightAverage, average_of

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
