"""What a mixture is made of, as options: its datasets, and the teachers that rows name."""

from __future__ import annotations

from pathlib import Path

import chz

from envs.sources import NAMES
from recipes.served import ServerOptions
from recipes.teacher_options import OneTeacher
from recipes.teachers import EMA


@chz.chz
class Rows:
    """One dataset of the mixture."""

    dataset: str = chz.field(doc="arithmetic, deepmath, tulu3, gsm8k, or a path to JSONL (one `messages` per row)")
    dataset_path: str | None = chz.field(default=None, doc="a local copy of the named dataset: file or folder")
    name: str | None = chz.field(default=None, doc="in metrics and episodes; default: the dataset's or the file's")
    max_rows: int | None = chz.field(default=None, doc="use at most this many training rows")
    group_size: int = chz.field(default=1, doc="attempts per prompt")
    groups_per_batch: int = chz.field(default=64, doc="prompts per step")
    weight: float = chz.field(
        default=1.0, doc="factor on its tokens' losses; they are still divided by all of the step's"
    )
    eval_size: int = chz.field(default=64, doc="held-out rows to evaluate on; 0: no evaluation")

    @property
    def title(self) -> str:
        return self.name or (self.dataset if self.dataset in NAMES else Path(self.dataset).stem)


@chz.chz
class DatasetOptions(OneTeacher, Rows):
    """One dataset of the mixture, and the teacher of its rows that name none."""


@chz.chz
class TeacherOptions(ServerOptions):
    """A teacher that rows name, or that is blended with others; here or on a server."""

    model: str | None = chz.field(
        default=None,
        doc=f"hub id, local folder or .gguf file; {EMA}: the student's moving average. With a url: its tokenizer and "
        "chat template; default: the model that is served",
    )
    route_value: str | None = chz.field(
        default=None, doc="what a row says to be judged by it; default: its model, or its url"
    )
    blend_weight: float | None = chz.field(
        default=None,
        doc="how much it counts among those of its route_value, or, if all have a weight, among all for rows that "
        "name none; 0 leaves it out",
    )
    checkpoint: str | None = chz.field(default=None, doc="its weights: HF folder or adapter")
    system_prompt: str | None = chz.field(
        default=None, doc="system message in its view; default: the student's, '' for none"
    )
    chat_template_kwargs: str | None = chz.field(
        default=None, doc="JSON object for its chat template; default: the student's"
    )

    @property
    def route(self) -> str:
        return self.route_value or self.model or next(iter(self.url), "")

    def server(self) -> ServerOptions:
        """The options of its server alone."""
        return ServerOptions(**{name: getattr(self, name) for name in chz.chz_fields(ServerOptions)})
