"""Spans of text that two tokenizers cut alike, against a brute-force search over all pairs of cuts."""

from __future__ import annotations

import codecs
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from envs.rendering import make_renderer
from envs.types import Episode, EpisodeLog, Message, Observation, Sampled, StopReason
from errors import TokenizerMismatchError
from models.byte_alignment import ByteAlignment, TokenBytes, align
from models.causal_lm import CausalLM
from models.checks import check_pair
from models.teacher_view import ViewMaker
from models.transformers_scorer import TransformersScorer
from models.types import Signal, SignalKind

QUESTION: Message = {"role": "user", "content": "what is in the tin?"}
TEXT = "the tin in the 漢字 thé 🙂 then"


def bytefallback(template: str | None = tiny.CHATML) -> Any:
    """SentencePiece-like: "▁" is a space, and what it has no piece for is written byte by byte."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz?.,:\n", "字"]
    merges = [("▁", "t"), ("▁t", "h"), ("i", "n"), ("▁th", "e")]
    pieces += ["".join(merge) for merge in merges]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def metaspace() -> Any:
    """SentencePiece without a fallback: what it does not know is <unk>."""
    pieces = {p: i for i, p in enumerate(["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz?.", "▁th", "▁t"])}
    backend = Tokenizer(models.BPE(pieces, [("▁", "t"), ("▁t", "h")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = tiny.CHATML
    return tokenizer


BYTES = make_renderer(tiny.chat(tiny.CHATML, eos="<|im_end|>"), name="byte-level")
OTHER = make_renderer(  # other merges, other ids, another format
    tiny.chat(tiny.BRACKETS, eos="<|end|>", merges=[("h", "e"), ("Ġ", "t"), ("Ġt", "i"), ("n", "Ġ"), ("he", "n")]),
    name="other merges",
)
FALLBACK = make_renderer(bytefallback(), name="byte fallback")
META = make_renderer(metaspace(), name="metaspace")
ALL = {"bytes": BYTES, "other": OTHER, "fallback": FALLBACK}
EVERY_PAIR = [(a, b) for a in ALL for b in ALL]


def places_of(written: bytes) -> list[int | None]:
    """Where each place between two bytes is in the text's bytes, by a decoder that is fed byte by byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    places: list[int | None] = [0]
    text, begun = "", 0
    for i in range(len(written)):
        new = decoder.decode(written[i : i + 1], final=False)
        meant = written[max(0, i - 2) : i + 1] == "\ufffd".encode()
        if begun and "\ufffd" in new and not meant:  # what was begun came to nothing, and ends here
            places[i - begun + 1 : i + 1] = [None] * (begun - 1) + [len(text.encode()) + 3]
        text, begun = text + new, len(decoder.getstate()[0])
        places.append(len(text.encode()) + begun)
    if begun:
        places[len(written) - begun + 1 :] = [None] * (begun - 1) + [len(text.encode()) + 3]
    return places


def brute_force(student: list[bytes], teacher: list[bytes]) -> tuple[list[int], list[int], int]:
    """Spans by trying every pair of prefixes."""
    mine, theirs, span, i, j = [-1] * len(student), [-1] * len(teacher), 0, 0, 0
    text, places = b"".join(student).decode(errors="replace").encode(), places_of(b"".join(student))
    for a in range(1, len(student) + 1):
        place = places[len(b"".join(student[:a]))]
        for b in range(1, len(teacher) + 1):
            read = b"".join(teacher[:b])
            if a > i and b > j and place and place == len(read) and text.startswith(read):
                mine[i:a], theirs[j:b] = [span] * (a - i), [span] * (b - j)
                i, j, span = a, b, span + 1
    return mine, theirs, span


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_spans_are_those_of_a_brute_force_search(data: st.DataObject):
    letters = st.text(st.sampled_from("ab é漢🙂\ufffd"), max_size=6).map(str.encode)
    written = data.draw(
        st.one_of(letters, st.binary(max_size=10), st.lists(letters | st.binary(max_size=2)).map(b"".join))
    )
    text = written.decode(errors="replace").encode()
    read = data.draw(st.one_of(st.just(text), letters))

    def cut(whole: bytes) -> list[bytes]:
        places = data.draw(st.sets(st.integers(1, max(1, len(whole) - 1))))
        edges = [0, *sorted(p for p in places if p < len(whole)), len(whole)]
        return [whole[a:b] for a, b in pairwise(edges)] if whole else []

    student, teacher = cut(written), cut(read)
    if student:
        assert align(student, teacher) == (*brute_force(student, teacher), text == read)


def test_a_character_in_pieces_is_one_span_with_them():
    pieces = ["漢".encode()[:1], "漢".encode()[1:], b"a"]
    assert align(pieces, ["漢".encode(), b"a"]) == ([0, 0, 1], [0, 1], 2, True)
    assert align(pieces, pieces) == ([0, 1, 2], [0, 1, 2], 3, True)
    assert align([b"ab", b"c"], [b"a", b"bc"]) == ([0, 0], [0, 0], 1, True)
    assert align([b"x"], [b"y"]) == ([-1], [-1], 0, False)


def test_what_is_no_character_is_the_one_that_everybody_reads():
    lost = "\ufffd".encode()
    assert align([b"a", b"\xe6", b"b"], [b"a", lost[:1], lost[1:], b"b"]) == ([0, 1, 2], [0, 1, 1, 2], 3, True)
    assert align([b"\xe6", b"\xbc", b"b"], [lost, b"b"]) == ([0, 0, 1], [0, 1], 2, True)  # one for both
    assert align([b"a", b"\xe6"], [b"a", lost]) == ([0, 1], [0, 1], 2, True)
    assert align([b"a", b"\xe6"], [b"a", lost], cut=True) == ([0, -1], [0, -1], 1, False)
    assert align([b"a\xe6"], [b"a", lost], cut=True) == ([-1], [-1, -1], 0, False)


@pytest.mark.parametrize("name", [*ALL, "meta"])
def test_the_bytes_of_tokens_are_the_text(name: str):
    renderer = {**ALL, "meta": META}[name]
    text = TEXT if name != "meta" else "the tin in then"
    ids = renderer.encode_text(text)
    assert b"".join(TokenBytes(renderer).of(ids)) == text.encode()
    assert TokenBytes(renderer).of([10**6]) == [b"\xff"], "an id that stands for nothing is no text"


def episode(student: Any, *turns: list[int]) -> Episode:
    log = EpisodeLog(Observation(student.prompt([QUESTION]), (QUESTION,)))
    for i, ids in enumerate(turns):
        log.append_sampled(Sampled(ids, [-1.0] * len(ids), stopped=True))
        if i < len(turns) - 1:
            ended = ids[-1] in student.stop.token_ids
            log.append_observation(Observation(student.continuation([QUESTION], ended=ended), (QUESTION,)))

    class Row:
        dataset, row_id, teacher, teacher_messages = "d", "r", "t", None

    return log.finish(Row(), StopReason.COMPLETED, 0.0, {}, {})  # type: ignore[arg-type]


def makers(a: str, b: str) -> ViewMaker:
    student, teacher = ALL[a], ALL[b]
    return ViewMaker(student, teacher, ByteAlignment(student, teacher))


@pytest.mark.parametrize(("a", "b"), EVERY_PAIR)
def test_a_view_is_the_same_text_in_the_teacher_s_format_and_tokens(a: str, b: str):
    maker = makers(a, b)
    student, teacher = maker.student, maker.teacher
    turns = [*student.encode_text(TEXT), student.end_of_turn_id], student.encode_text("cut in the"), [
        *student.encode_text("then"), student.end_of_turn_id
    ]  # fmt: skip
    done = episode(student, *turns)
    view = maker.view(done)
    expected = [
        *teacher.prompt([QUESTION]), *teacher.encode_text(TEXT), teacher.end_of_turn_id,
        *teacher.continuation([QUESTION], ended=True), *teacher.encode_text("cut in the"),
        *teacher.continuation([QUESTION], ended=False), *teacher.encode_text("then"), teacher.end_of_turn_id,
    ]  # fmt: skip
    assert view.token_ids.tolist() == expected
    if student is teacher:  # then it is the log itself
        assert view.spans is None and view.token_ids.tolist() == done.token_ids.tolist()
        return
    assert view.spans is not None and view.swap is None
    own = TokenBytes(student).of(done.token_ids[view.student_positions].tolist())
    theirs = TokenBytes(teacher).of(view.token_ids[view.positions].tolist())
    for span in range(view.spans.count):
        mine = b"".join(piece for piece, s in zip(own, view.spans.student, strict=True) if s == span)
        judged = b"".join(piece for piece, s in zip(theirs, view.spans.teacher, strict=True) if s == span)
        assert mine == judged or {mine, judged} <= {b"<|im_end|>", b"<|end|>"}
    assert (view.spans.student >= 0).all() and (np.diff(view.spans.student) >= 0).all()
    assert view.spans.count > 3 * len(turns)


async def spans_of(maker: ViewMaker, attempt: Episode, teacher: CausalLM) -> Signal:
    view = maker.view(attempt)
    (signal,) = await TransformersScorer("t", teacher).score([view], SignalKind.SAMPLED)
    return signal if view.spans is None else signal.of_spans(view.spans)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
@pytest.mark.parametrize(("a", "b"), [(a, b) for a, b in EVERY_PAIR if a != b])
async def test_a_span_s_logprob_is_what_the_teacher_s_plain_forward_gives_its_text(a: str, b: str):
    maker = makers(a, b)
    model = tiny.model("llama", vocab_size=len(maker.teacher.tokenizer))
    done = episode(maker.student, [*maker.student.encode_text(TEXT), maker.student.end_of_turn_id])
    signal = await spans_of(maker, done, CausalLM.verified(model))
    answer = [*maker.teacher.encode_text(TEXT), maker.teacher.end_of_turn_id]
    prompt = maker.teacher.prompt([QUESTION])
    each = tiny.plain_logprobs(model, prompt, answer).double()
    pieces = [TokenBytes(r).of(ids[:-1]) for r, ids in (
        (maker.student, [*maker.student.encode_text(TEXT), 0]), (maker.teacher, answer)
    )]  # fmt: skip
    mine, theirs, count = brute_force(*pieces)
    expected = [sum(float(x) for x, s in zip(each[:-1], theirs, strict=True) if s == span) for span in range(count)]
    assert signal.logprobs is not None and signal.spans is not None
    torch.testing.assert_close(
        signal.logprobs.double(), torch.tensor([*expected, float(each[-1])]).double(), atol=1e-4, rtol=0
    )
    assert signal.spans.tolist() == [*mine, count]


@pytest.mark.anyio
async def test_with_one_tokenizer_every_token_is_a_span_of_its_own():
    """Then the numbers are those of ids, to the bit, in another format of the same tokenizer."""
    student, teacher = BYTES, make_renderer(tiny.chat(tiny.BRACKETS, eos="<|end|>"), name="same tokens")
    lm = CausalLM.verified(tiny.model("llama", vocab_size=len(teacher.tokenizer)))
    done = episode(student, [*student.encode_text(TEXT), student.end_of_turn_id], student.encode_text("the tin"))
    by_ids = await spans_of(ViewMaker(student, teacher), done, lm)
    by_bytes = await spans_of(ViewMaker(student, teacher, ByteAlignment(student, teacher)), done, lm)
    assert by_bytes.spans is not None and by_bytes.spans.tolist() == [*range(done.num_sampled)]
    assert by_ids.logprobs is not None and by_bytes.logprobs is not None
    assert torch.equal(by_ids.logprobs, by_bytes.logprobs)


# --- what is not the same text


def unscored(maker: ViewMaker, turn: list[int]) -> list[int]:
    alignment = maker.alignment
    assert alignment is not None
    return [i for i, span in enumerate(alignment.read(turn).student_spans) if span < 0]


@pytest.mark.parametrize("teacher", ["other", "fallback"])
def test_a_character_that_a_cut_turn_left_half_written_is_in_no_span(teacher: str):
    maker = makers("bytes", teacher)
    whole = BYTES.encode_text("in 漢")
    assert unscored(maker, whole) == []
    for missing in (1, 2):
        cut = whole[:-missing]
        assert unscored(maker, cut) == [*range(len(BYTES.encode_text("in ")), len(cut))]
    # in a turn that went on, it is what everybody reads
    later = [*whole[:-1], *BYTES.encode_text("the"), BYTES.end_of_turn_id]
    assert unscored(maker, later) == []
    reading = maker.alignment.read(later)  # type: ignore[union-attr]
    text = b"".join(TokenBytes(maker.teacher).of(reading.token_ids[:-1])).decode()
    assert text == "in \ufffdthe" and reading.token_ids[-1] == maker.teacher.end_of_turn_id
    assert unscored(maker, [*whole[:-1], BYTES.end_of_turn_id]) == []


def test_what_the_teacher_s_tokenizer_does_not_know_is_in_no_span():
    alignment = ByteAlignment(BYTES, META)
    ids = BYTES.encode_text("the 漢 tin")
    reading = alignment.read(ids)
    known = len(BYTES.encode_text("the "))
    assert reading.spans >= 2
    assert [s >= 0 for s in reading.student_spans] == [i < known for i in range(len(ids))]


def test_control_tokens_that_both_have_are_read_as_such_and_others_as_text():
    extra = {"extra": ["<think>", "<|mine|>"]}
    student = make_renderer(tiny.chat(tiny.CHATML, eos="<|im_end|>", **extra), name="student")
    merges = [("h", "e")]
    teacher = make_renderer(
        tiny.chat(tiny.BRACKETS, eos="<|end|>", merges=merges, extra=["<|theirs|>", "<think>"]), name="teacher"
    )
    think, mine, end = (student.tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "<|mine|>", "<|end|>"))
    turn = [think, *student.encode_text("in"), mine, end, *student.encode_text("<|theirs|>"), student.end_of_turn_id]
    reading = ByteAlignment(student, teacher).read(turn)
    assert reading.token_ids[0] == teacher.tokenizer.convert_tokens_to_ids("<think>")
    controls = [i for i in reading.token_ids if i in teacher.tokenizer.added_tokens_decoder]
    assert controls == [reading.token_ids[0], teacher.end_of_turn_id], "what would end the turn is text in its midst"
    assert teacher.tokenizer.decode(reading.token_ids) == "<think>in<|mine|><|end|><|theirs|><|end|>"
    assert min(reading.student_spans) == 0


def test_a_space_that_sentencepiece_opens_a_text_with_is_nobody_s():
    ids = FALLBACK.tokenizer.encode(" the tin", add_special_tokens=False)
    assert FALLBACK.tokenizer.decode(ids) == "the tin"
    reading = ByteAlignment(FALLBACK, BYTES).read(ids)
    assert BYTES.tokenizer.decode(reading.token_ids) == "the tin"
    assert reading.spans >= 2 and min(reading.student_spans) == 0


# --- pairs


def test_a_pair_of_tokenizers_is_refused_unless_asked_for():
    with pytest.raises(TokenizerMismatchError, match="teacher_alignment=bytes"):
        check_pair("t", BYTES, FALLBACK)
    report = check_pair("t", BYTES, FALLBACK, by_bytes=True)
    assert "end of turn: '<|im_end|>' in both" in report.lines()[0]
    assert "another tokenizer: a probe of " in report.lines()[1] and "spans that both cut alike" in report.lines()[1]


def test_a_teacher_whose_tokenizer_loses_characters_is_refused():
    with pytest.raises(TokenizerMismatchError, match=r"teacher t's tokenizer \(metaspace\) does not keep every char"):
        check_pair("t", BYTES, META, by_bytes=True)


def test_a_pair_that_shares_its_ids_is_compared_by_ids_all_the_same():
    report = check_pair("t", BYTES, make_renderer(tiny.chat(tiny.BRACKETS, eos="<|end|>")), by_bytes=True)
    assert not report.by_bytes and report.shared_ids > 256


def test_a_tokenizer_that_does_not_say_its_bytes_is_refused_by_name():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "tin": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.chat_template = tiny.CHATML
    with pytest.raises(TokenizerMismatchError, match=r"tokenizer of words cannot be aligned by bytes.*decoder: none"):
        check_pair("t", BYTES, make_renderer(words, name="words"), by_bytes=True)
