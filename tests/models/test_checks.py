"""The start-up checks refuse every pair that would train on nonsense, and pass the others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from envs.rendering import make_renderer
from errors import ConfigError, TeacherError, TokenizerMismatchError
from models.causal_lm import CausalLM
from models.checks import (
    check_pair,
    common_temperature,
    default_device,
    default_dtype,
    probe_scorer,
    probe_view,
)
from models.teacher_view import ViewMaker
from models.transformers_scorer import TransformersScorer
from models.types import Signal, SignalKind, TeacherView

STUDENT = make_renderer(tiny.chat(tiny.CHATML, eos="<|im_end|>"), name="student-1b")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def teacher(template: str = tiny.CHATML, eos: str = "<|im_end|>", **kwargs: Any) -> Any:
    return make_renderer(tiny.chat(template, eos=eos, **kwargs), name="teacher-70b")


# --- temperature


def test_one_temperature_for_all():
    assert common_temperature(0.7, {"a": 0.7, "b": None}) == 0.7


@pytest.mark.parametrize("sampling", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_cannot_be_compared_at_is_refused(sampling: float):
    with pytest.raises(ConfigError, match="above 0"):
        common_temperature(sampling, {})


@pytest.mark.parametrize("other", [0.7, 0.0, float("nan")])
def test_unlike_temperatures_are_refused_by_name(other: float):
    with pytest.raises(ConfigError, match=f"temperature=1.0 but teacher big is scored at {other}"):
        common_temperature(1.0, {"fine": 1.0, "big": other})


# --- pairs


def test_the_same_tokenizer():
    report = check_pair("t", STUDENT, teacher())
    assert (report.student_only_ids, report.teacher_only_ids) == (0, 0)
    assert report.shared_ids == len(STUDENT.tokenizer.get_vocab())
    assert report.same_format
    assert report.end_of_turn == ("<|im_end|>", "<|im_end|>")
    assert "'<|im_end|>' in both" in report.lines()[0]


def test_another_format_says_how_turns_end():
    report = check_pair("t", STUDENT, teacher(tiny.BRACKETS, "<|end|>"))
    assert not report.same_format
    assert "'<|im_end|>' is read as '<|end|>'" in report.lines()[0]


def test_ids_that_one_side_alone_has_are_counted_not_refused():
    bigger = teacher(extra=("<|tool|>", "<|image|>"))
    assert check_pair("t", STUDENT, bigger).teacher_only_ids == 2
    assert check_pair("t", bigger, STUDENT).student_only_ids == 2


def test_a_permuted_vocabulary_is_refused_naming_both_sides():
    vocab = {t: i for t, i in STUDENT.tokenizer.get_vocab().items() if not t.startswith("<|")}
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    with pytest.raises(TokenizerMismatchError, match=r"student-1b.*teacher big's \(teacher-70b\).*2 of") as error:
        check_pair("big", STUDENT, teacher(vocab=vocab))
    assert "'a'" in str(error.value) and "'b'" in str(error.value)


def test_the_same_vocabulary_with_other_merges_is_refused():
    vocab = {t: i for t, i in STUDENT.tokenizer.get_vocab().items() if not t.startswith("<|")} | {"de": 900}
    same = make_renderer(tiny.chat(tiny.CHATML, eos="<|im_end|>", vocab=vocab), name="student-1b")
    other = teacher(vocab=vocab, merges=[("d", "e")])
    with pytest.raises(TokenizerMismatchError, match="split text differently"):
        check_pair("big", same, other)


def test_an_end_of_turn_that_the_other_side_lacks_is_refused():
    template = tiny.CHATML.replace("<|im_end|>", "<|eot|>")
    odd = teacher(template, "<|eot|>", extra=("<|eot|>",))
    with pytest.raises(TokenizerMismatchError, match="teacher big ends its turns"):
        check_pair("big", STUDENT, odd)
    with pytest.raises(TokenizerMismatchError, match="the student ends its turns"):
        check_pair("big", odd, STUDENT)


# --- scorers


VIEW = TeacherView(np.array([1, 2, 3, 4]), np.array([1, 3]), np.array([1, 3]))


class Scripted:
    """A teacher whose answers are given: one list of signals per call."""

    name = "scripted"
    temperature = 1.0

    def __init__(self, *answers: Callable[[], list[Signal]]) -> None:
        self.answers = list(answers)

    async def score(self, views: Any, need: SignalKind) -> list[Signal]:
        assert len(views) == 1 and need is SignalKind.SAMPLED
        return self.answers.pop(0)()


def says(*logprobs: float) -> Callable[[], list[Signal]]:
    return lambda: [Signal(logprobs=torch.tensor(logprobs))]


def head(hidden: Tensor) -> Tensor:
    return hidden


@pytest.mark.anyio
async def test_a_good_scorer_passes():
    await probe_scorer(Scripted(says(-1.0, -2.0), says(-1.0, -2.0001)), VIEW)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (says(-1.0, -2.0), says(-1.0, -2.1), "noise"),
        (says(-1.0, 0.5), says(-1.0, 0.5), "above 0"),
        (says(-1.0), says(-1.0), "every token"),
        (says(-1.0, -2.0), says(-1.0), "every token"),
        (says(-1.0, -2.0), lambda: [], "every token"),
        (lambda: [], says(-1.0, -2.0), "every token"),
        (lambda: [Signal(hidden=torch.zeros(2, 3), head=head)], says(-1.0, -2.0), "every token"),
    ],
)
async def test_a_bad_scorer_is_refused(first: Any, second: Any, reason: str):
    with pytest.raises(TeacherError, match=f"scripted .*{reason}"):
        await probe_scorer(Scripted(first, second), VIEW)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_a_missing_value_is_never_a_signal(value: float):
    with pytest.raises(ValueError, match="missing or not finite"):
        Signal(logprobs=torch.tensor([-1.0, value]))


@pytest.mark.parametrize("positions", [[0, 1], [1, 4], [-1]])
def test_a_position_that_nothing_predicts_is_refused(positions: list[int]):
    with pytest.raises(ValueError, match="predicts"):
        TeacherView(np.array([1, 2, 3, 4]), np.array(positions), np.array(positions))


@pytest.mark.anyio
async def test_a_real_scorer_passes_on_the_probe_view():
    for renderer in (STUDENT, teacher(tiny.BRACKETS, "<|end|>"), make_renderer(tiny.letters())):
        view = probe_view(ViewMaker(STUDENT, renderer))
        read = renderer.tokenizer.decode(view.token_ids[view.positions].tolist())
        assert view.token_ids[view.positions[-1]] == renderer.end_of_turn_id
        assert "nswer is" in read
        model = tiny.model(vocab_size=int(view.token_ids.max()) + 8)  # a padded embedding
        await probe_scorer(TransformersScorer("t", CausalLM.verified(model)), view)


def test_an_unknown_device_is_refused():
    assert default_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=abacus"):
        default_device("abacus")
    if not torch.cuda.is_available():
        assert default_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="no CUDA device"):
            default_device("cuda:0")


def test_a_gpu_is_named_by_its_number_and_must_be_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert default_device("auto") == default_device("cuda") == torch.device("cuda", 0)
    assert default_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"device=cuda:2: torch sees 2 CUDA device\(s\) here, cuda:0 to cuda:1"):
        default_device("cuda:2")


@pytest.mark.parametrize(("generation", "dtype"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(
    generation: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=generation))
    assert default_dtype("auto", torch.device("cuda", 0)) == dtype
    assert default_dtype("auto", torch.device("cpu")) == torch.float32
