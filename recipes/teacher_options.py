"""The options of one teacher, `teacher_model` and what belongs to it: of a recipe, or of one dataset of several."""

from __future__ import annotations

import chz

from errors import ConfigError
from recipes.served import ServerOptions
from recipes.student_config import json_object
from recipes.teachers import TeacherSpec, ema_decay_of


@chz.chz
class OneTeacher:
    """To be inherited from. It validates nothing itself, for chz may drop a second base's validators: whoever has these
    options calls `check_teacher`."""

    teacher_model: str | None = chz.field(
        default=None,
        doc="the teacher: hub id, local folder or .gguf file. With teacher.url: its tokenizer and chat template; "
        "default: the model that is served",
    )
    teacher: ServerOptions = chz.field(default_factory=ServerOptions, doc="a teacher that a server holds")
    teacher_checkpoint: str | None = chz.field(default=None, doc="the teacher's weights: HF folder or adapter")
    teacher_system_prompt: str | None = chz.field(
        default=None, doc="system message in the teacher's view; default: the student's, '' for none"
    )
    teacher_chat_template_kwargs: str | None = chz.field(
        default=None, doc="JSON object for the teacher's chat template; default: the student's"
    )

    @property
    def has_teacher(self) -> bool:
        return self.teacher_model is not None or bool(self.teacher.url)

    def check_teacher(self, prefix: str = "") -> None:
        """`prefix`: what the options' names begin with. Raises `ConfigError`."""
        check_server(self.teacher, self.teacher_checkpoint, f"{prefix}teacher_checkpoint")
        for name in ("teacher_checkpoint", "teacher_system_prompt", "teacher_chat_template_kwargs"):
            if not self.has_teacher and getattr(self, name) is not None:
                raise ConfigError(f"{prefix}{name} needs {prefix}teacher_model: there is no teacher to have it")

    def teacher_spec(self, name: str, ema_decay: float | None, prefix: str = "") -> TeacherSpec:
        """`ema_decay`: of a teacher that is the student's average, if it is given. Raises `ConfigError`."""
        kwargs = self.teacher_chat_template_kwargs
        return TeacherSpec(
            name=name,
            model=self.teacher_model,
            checkpoint=self.teacher_checkpoint,
            system_prompt=self.teacher_system_prompt,
            template_kwargs=None if kwargs is None else json_object(f"{prefix}teacher_chat_template_kwargs", kwargs),
            ema_decay=ema_decay_of(self.teacher_model, ema_decay),
            server=self.teacher,
            server_option=f"{prefix}teacher.",
        )


def check_server(server: ServerOptions, checkpoint: str | None, option: str) -> None:
    """Raises `ConfigError` for weights beside a server that has its own."""
    if server.url and checkpoint is not None:
        raise ConfigError(
            f"{option}={checkpoint}: the server has the teacher's weights. Leave it out, or leave out url"
        )
