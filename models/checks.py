"""Checked before anything trains: that student and teacher mean the same by the same ids, and are
compared at the same temperature, and that the teacher answers twice alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from envs.rendering import Renderer, control_tokens
from errors import ConfigError, TeacherError, TokenizerMismatchError
from models.byte_alignment import PROBE_TEXT, ByteAlignment
from models.teacher_view import ViewMaker
from models.types import Scorer, SignalKind, TeacherView

REPEAT_TOLERANCE = 1e-3  # nats, between two scorings of one sequence
BATCHED_REPEAT_TOLERANCE = 0.05
"""The same, of a server that may compute in bfloat16: that rounds otherwise when requests are batched otherwise."""


@dataclass(frozen=True)
class PairReport:
    """What was found when one student-teacher pair was compared."""

    teacher: str
    shared_ids: int
    student_only_ids: int
    teacher_only_ids: int
    renamed: tuple[str, ...]  # control tokens of one id and two names, student's / teacher's
    same_format: bool
    end_of_turn: tuple[str, str]  # the student's token, the teacher's
    by_bytes: str = ""  # of a teacher with another tokenizer: how finely a probe's text is compared

    def lines(self) -> list[str]:
        how = "the same chat format" if self.same_format else "its own chat format"
        ends = self.end_of_turn
        mapped = f"{ends[0]!r} is read as {ends[1]!r}" if ends[0] != ends[1] else f"{ends[0]!r} in both"
        first = f"teacher {self.teacher}: reads {how}; end of turn: {mapped}"
        if self.by_bytes:
            return [first, f"  it has another tokenizer: {self.by_bytes}"]
        return [
            first,
            f"  {self.shared_ids} token ids mean the same; only the student has {self.student_only_ids}, "
            f"only the teacher {self.teacher_only_ids}"
            + (f"; control tokens named differently: {', '.join(self.renamed)}" if self.renamed else ""),
        ]


def check_pair(name: str, student: Renderer, teacher: Renderer, *, by_bytes: bool = False) -> PairReport:
    """Compare tokenizers by content; `by_bytes`: where they differ, see that the text of both can be compared.

    Raises `TokenizerMismatchError` naming both sides and the way out."""
    try:
        return _check_ids(name, student, teacher)
    except TokenizerMismatchError:
        if not by_bytes:
            raise
    reading = ByteAlignment(student, teacher).read([*student.encode_text(PROBE_TEXT), student.end_of_turn_id])
    if min(reading.student_spans) < 0:  # a student would soon find out that such text is judged by nobody
        raise TokenizerMismatchError(
            f"teacher {name}'s tokenizer ({teacher.name}) does not keep every character: it reads "
            f"{teacher.tokenizer.decode(reading.token_ids)!r} for {PROBE_TEXT!r}. teacher_alignment=bytes needs one "
            "that does"
        )
    ends = [r.tokenizer.convert_ids_to_tokens(r.end_of_turn_id) for r in (student, teacher)]
    return PairReport(
        teacher=name,
        shared_ids=0,
        student_only_ids=len(student.tokenizer.get_vocab()),
        teacher_only_ids=len(teacher.tokenizer.get_vocab()),
        renamed=(),
        same_format=False,
        end_of_turn=(ends[0], ends[1]),
        by_bytes=f"a probe of {len(PROBE_TEXT.encode())} bytes is {len(reading.student_spans)} tokens of the student, "
        f"{len(reading.token_ids)} of the teacher, and {reading.spans} spans that both cut alike",
    )


def _check_ids(name: str, student: Renderer, teacher: Renderer) -> PairReport:
    ours, theirs = _tokens_by_id(student.tokenizer), _tokens_by_id(teacher.tokenizer)
    shared = ours.keys() & theirs.keys()
    # Control tokens stand for no text, and model families rename their reserved ones; words must agree.
    renamed = control_tokens(student.tokenizer).keys() & control_tokens(teacher.tokenizer).keys()
    different = sorted(i for i in shared - renamed if ours[i] != theirs[i])
    if different or not shared:
        i = different[0] if different else 0
        raise TokenizerMismatchError(
            f"the student's tokenizer ({student.name}) and teacher {name}'s ({teacher.name}) give {len(different)} of "
            f"{len(shared)} ids different meanings, e.g. id {i} is {ours.get(i)!r} and {theirs.get(i)!r}. {WAYS_OUT}"
        )
    _check_same_text_same_ids(name, student, teacher)
    maker = ViewMaker(student, teacher)
    for token, owner, vocabulary in (
        (teacher.end_of_turn_id, f"teacher {name}", ours),
        (student.end_of_turn_id, "the student", theirs),
    ):
        if token not in vocabulary:
            raise TokenizerMismatchError(
                f"{owner} ends its turns with id {token}, which the other tokenizer does not have: "
                f"{student.name} and {teacher.name} cannot be aligned. {WAYS_OUT}"
            )
    return PairReport(
        teacher=name,
        shared_ids=len(shared),
        renamed=tuple(f"{ours[i]!r} / {theirs[i]!r}" for i in sorted(renamed) if ours[i] != theirs[i]),
        student_only_ids=len(ours) - len(shared),
        teacher_only_ids=len(theirs) - len(shared),
        same_format=maker.student.fingerprint == maker.teacher.fingerprint,
        end_of_turn=(ours[student.end_of_turn_id], theirs[teacher.end_of_turn_id]),
    )


WAYS_OUT = (
    "Choose a teacher of the student's model family. (On-policy training can also compare what text says, and not ids: "
    "objective=reverse_kl teacher_alignment=bytes)"
)


def _check_same_text_same_ids(name: str, student: Renderer, teacher: Renderer) -> None:
    """The same ids could still be reached by other merges: the teacher would then read text that it never
    tokenises so itself."""
    ours, theirs = (r.tokenizer.encode(PROBE_TEXT, add_special_tokens=False) for r in (student, teacher))
    if ours != theirs:
        raise TokenizerMismatchError(
            f"the student's tokenizer ({student.name}) and teacher {name}'s ({teacher.name}) share a vocabulary but "
            f"split text differently. {WAYS_OUT}"
        )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def common_temperature(sampling: float, teachers: Mapping[str, float | None]) -> float:
    """The one temperature at which sampler, learner and every teacher are compared.

    Logprobs at unlike temperatures are of different distributions: their gap is not a KL. Raises `ConfigError`.
    """
    if not (sampling > 0 and np.isfinite(sampling)):
        raise ConfigError(f"temperature={sampling}: on-policy sampling needs a finite temperature above 0")
    for name, temperature in teachers.items():
        if temperature is not None and temperature != sampling:
            raise ConfigError(
                f"the student samples at temperature={sampling} but teacher {name} is scored at {temperature}: "
                "their logprobs cannot be compared. Give both the same temperature"
            )
    return sampling


async def probe_scorer(scorer: Scorer, view: TeacherView) -> None:
    """Score one view twice. Raises `TeacherError` unless both answers are there and agree."""
    answers = [await scorer.score([view], SignalKind.SAMPLED) for _ in range(2)]
    first, second = [signals[0].logprobs if len(signals) == 1 else None for signals in answers]
    if first is None or second is None or not len(first) == len(second) == len(view.positions):
        raise TeacherError(f"teacher {scorer.name} did not return a logprob for every token asked for")
    gap = (first - second).abs().max().item()
    if gap > REPEAT_TOLERANCE or (first > 1e-4).any():
        raise TeacherError(
            f"teacher {scorer.name} scored one sequence twice and differs by {gap:.3g} nats: its signal is noise"
            if gap > REPEAT_TOLERANCE
            else f"teacher {scorer.name} returned a logprob above 0"
        )


def probe_view(maker: ViewMaker, text: str = "The answer is 4.") -> TeacherView:
    """A short made-up turn in the teacher's format, for `probe_scorer`."""
    prompt = maker.teacher.prompt([{"role": "user", "content": "What is 2 + 2?"}])
    answer = maker.teacher.tokenizer.encode(text, add_special_tokens=False)
    answer = [*(answer or [maker.teacher.end_of_turn_id]), maker.teacher.end_of_turn_id]
    positions = np.arange(len(prompt), len(prompt) + len(answer))
    return TeacherView(np.array([*prompt, *answer], dtype=np.int64), positions, positions)


def default_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU. Raises `ConfigError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(f"device={name}: torch sees no CUDA device here; use device=cpu")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device={name}: torch sees {count} CUDA device(s) here, cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def default_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on GPUs that compute in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    # Before Ampere it is emulated, slowly, and vLLM refuses it. All of AMD's have it.
    has_it = torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8
    return torch.bfloat16 if has_it else torch.float32
