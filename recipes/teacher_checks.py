"""Whether a teacher fits the student, found out without a weight being read: here, or by asking its server."""

from __future__ import annotations

from pathlib import Path

import anyio
from transformers import GenerationConfig

from envs.rendering import Renderer, make_renderer
from errors import ConfigError, ModelError
from models.adapters import adapter_bytes
from models.byte_alignment import ByteAlignment
from models.checks import PairReport, check_pair, default_device
from models.loading import load_tokenizer
from models.sources import ModelSource, check_source, is_adapter
from models.teacher_view import ViewMaker
from recipes import embedded, served
from recipes.student_config import StudentConfig
from recipes.teachers import EMA, CheckedTeacher, TeacherSpec, weights_fingerprint


def check_teacher(config: StudentConfig, spec: TeacherSpec, student: Renderer, *, tools: bool) -> CheckedTeacher:
    """Raises `UserError`s; `tools`: episodes of several turns, with tools."""
    if spec.server.url:
        return anyio.run(_check_served_teacher, config, spec, student, tools)
    assert spec.model is not None
    source = ModelSource(embedded.resolve(spec.model), spec.checkpoint)
    if spec.ema_decay is not None:
        source = student_source(config)[0]
    check_source(source)
    renderer = _teacher_renderer(config, spec, source, tools)
    report = check_pair(spec.name, student, renderer, by_bytes=config.aligns_by_bytes())
    weights = EMA if spec.ema_decay is not None else weights_fingerprint(source)
    size = None if spec.ema_decay is not None else adapter_bytes(source)  # an average moves: it is no fixed adapter
    return CheckedTeacher(
        name=spec.name,
        source=source,
        weights=weights,
        renderer=renderer,
        views=_view_maker(student, renderer, report),
        report=report,
        base=weights if size is None else weights_fingerprint(ModelSource(source.name)),
        adapter_bytes=size,
        ema_decay=spec.ema_decay,
    )


async def _check_served_teacher(
    config: StudentConfig, spec: TeacherSpec, student: Renderer, tools: bool
) -> CheckedTeacher:
    option, access = spec.server_option, spec.server.access(spec.server_option)
    found = await served.find(access, spec.server.served_model, option)
    model = spec.model or found.source
    if model is None:
        raise ConfigError(
            f"{option}url={access.urls[0]} serves a folder of its own machine: give "
            f"{option.replace('teacher.', 'teacher_')}model=, a folder here or a hub id that has its tokenizer"
        )
    source = ModelSource(embedded.resolve(model))
    try:
        renderer = _teacher_renderer(config, spec, source, tools)
    except ModelError as error:
        if spec.model is not None:
            raise
        raise ModelError(
            f"{option}url={access.urls[0]} serves {found.source}, whose tokenizer cannot be used here ({error}). Name "
            f"a folder or hub id that has one: {option.replace('teacher.', 'teacher_')}model="
        ) from error
    report = check_pair(spec.name, student, renderer, by_bytes=config.aligns_by_bytes())
    maker = _view_maker(student, renderer, report)
    how = await served.check_fit(
        found, access, name=spec.name, option=option, maker=maker,
        need=config.signal_need(), temperature=config.comparison_temperature(), device=default_device(config.device),
    )  # fmt: skip
    return CheckedTeacher(
        name=spec.name,
        source=source,
        weights=f"served as {found.identity}",
        renderer=renderer,
        views=maker,
        report=report,
        base=f"served as {found.identity}",
        served=how,
    )


def _view_maker(student: Renderer, teacher: Renderer, report: PairReport) -> ViewMaker:
    return ViewMaker(student, teacher, ByteAlignment(student, teacher) if report.by_bytes else None)


def _teacher_renderer(config: StudentConfig, spec: TeacherSpec, source: ModelSource, tools: bool) -> Renderer:
    kwargs = config.student_template_kwargs() if spec.template_kwargs is None else dict(spec.template_kwargs)
    system_prompt = config.system_prompt if spec.system_prompt is None else spec.system_prompt
    renderer = renderer_for(source, kwargs, system_prompt or None)
    renderer.check(tools=tools, multi_turn=tools)
    return renderer


def student_source(config: StudentConfig) -> tuple[ModelSource, str | None]:
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
