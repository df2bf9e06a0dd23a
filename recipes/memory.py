"""What a run will hold in memory, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from models.loading import estimate_memory, load_config
from recipes import samplers
from recipes.setup import CheckedModels
from recipes.student_config import StudentConfig
from recipes.teachers import CheckedTeacher, by_base


def memory_lines(config: StudentConfig, models: CheckedModels) -> list[str]:
    """What the run will hold, from shapes alone."""
    weights_dtype = models.compute_dtype if config.lora_rank else torch.float32
    student = estimate_memory(load_config(models.student), dtype=weights_dtype, lora_rank=config.lora_rank)
    lines = [f"student {name}: {_gib(size)}" for name, size in student.items() if name != "total"]
    total = student["total"]
    on_demand: list[float] = []
    for base, groups in by_base(models.teachers).items():
        size, more = _base_memory(config, models, groups, base == models.shared_weights, student)
        lines += more
        if base in models.on_demand:
            on_demand.append(size)
        else:
            total += size
    if on_demand:
        limit = models.teachers_at_a_time or len(on_demand)
        total += sum(sorted(on_demand)[-limit:])
        lines.append(f"of these {len(on_demand)} models of teachers, {limit} in memory at a time")
    copy = estimate_memory(load_config(models.student), dtype=models.compute_dtype, trained=False)["total"]
    size, more = samplers.engine_memory(config, models.device, models.compute_dtype, copy)
    lines += more
    total += size
    remote = [teacher for teacher in models.teachers.values() if teacher.served is not None]
    lines += [f"teacher {teacher.name}: {teacher.served.line}" for teacher in remote if teacher.served is not None]
    lines.append(f"in all: {_gib(total)}, and activations of {config.token_budget(models.device)} tokens at a time")
    return lines


def _base_memory(
    config: StudentConfig,
    models: CheckedModels,
    groups: Sequence[Sequence[CheckedTeacher]],
    shared: bool,
    student: Mapping[str, float],
) -> tuple[float, list[str]]:
    """What the teachers on one base add, in bytes and in words; `shared`: it is the student's."""
    total, lines = 0.0, []
    where = "the student's base weights" if shared else None
    if where is None and len(groups) > 1:
        size = estimate_memory(load_config(groups[0][0].base_source), dtype=models.compute_dtype, trained=False)
        lines.append(f"base of {len(groups)} teachers: {_gib(size['total'])}")
        total += size["total"]
        where = "that base"
    for teacher, *others in groups:
        title = "teacher" if len(models.teachers) == 1 else f"teacher {teacher.name}"
        size, line = _teacher_memory(config, models, teacher, where, student)
        lines.append(f"{title}{line}")
        total += size
        lines += [f"teacher {other.name}: shares the weights of {teacher.name}" for other in others]
    return total, lines


def _teacher_memory(
    config: StudentConfig,
    models: CheckedModels,
    teacher: CheckedTeacher,
    where: str | None,
    student: Mapping[str, float],
) -> tuple[float, str]:
    """What a teacher adds, in bytes and in words; `where` names the base that it shares, if it shares one."""
    if teacher.ema_decay is not None and config.lora_rank:
        size = student["gradients"]  # of what is trained: the adapter
        return size, f": a second adapter on the student's base weights, {_gib(size)}"
    if teacher.ema_decay is not None:
        size = student["parameters"]
        return size, f": a copy of the student's weights, {_gib(size)}"
    if where is None:
        size = estimate_memory(load_config(teacher.source), dtype=models.compute_dtype, trained=False)["total"]
        return size, f" parameters: {_gib(size)}"
    if teacher.adapter_bytes is None:
        return 0, f": shares {where}"
    return teacher.adapter_bytes, f": an adapter on {where}, {_gib(teacher.adapter_bytes)}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
