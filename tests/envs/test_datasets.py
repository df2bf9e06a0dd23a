"""The JSONL contract, splits, the cursor, and the named sources."""

import json
import logging

import datasets as hf
import pytest

from envs import sources
from envs.datasets import Cursor, Row, fingerprint, parse_row, prompt_key, read_jsonl, split_held_out
from envs.sources import BOXED_INSTRUCTION, load_dataset_rows
from envs.types import TeacherHint
from errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, *records, end="\n"):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def make_rows(n):
    return [Row(row_id=f"r{i}", messages=(user(f"question {i}"),)) for i in range(n)]


# --- rows -----------------------------------------------------------------------------------------


def test_every_field_of_the_contract_is_kept():
    row = parse_row(
        {
            "id": "a",
            "messages": [{"role": "system", "content": "s"}, user("q")],
            "teacher_messages": [user("q, and the solution")],
            "teacher": "big",
            "expected_answer": "72",
            "completion": "it is 72",
        },
        "f:1",
    )
    assert row == Row(
        row_id="a",
        messages=({"role": "system", "content": "s"}, user("q")),
        teacher_messages=(user("q, and the solution"),),
        teacher="big",
        expected_answer="72",
        completion="it is 72",
    )


def test_hints_on_the_way_are_kept_in_order():
    hints = [{"after_turn": 2, "messages": [user("warm")]}, {"messages": [{"role": "system", "content": "look"}]}]
    row = parse_row({"messages": [user("q")], "teacher_hints": hints}, "f:1")
    assert row.teacher_hints == (
        TeacherHint((user("warm"),), after_turn=2),
        TeacherHint(({"role": "system", "content": "look"},)),
    )
    assert fingerprint([row]) != fingerprint([parse_row({"messages": [user("q")]}, "f:1")])


def test_text_parts_are_joined_and_a_tool_calls_null_content_is_empty():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = parse_row(
        {
            "messages": [
                user(parts),
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "out", "tool_call_id": "1", "name": None},
            ]
        },
        "f:1",
    )
    assert row.messages == (
        user("ab"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "out", "tool_call_id": "1"},
    )


def test_a_trailing_assistant_message_becomes_the_completion():
    row = parse_row({"messages": [user("q"), assistant("a")]}, "f:1")
    assert (row.messages, row.completion) == ((user("q"),), "a")


def test_a_numeric_expected_answer_is_read_as_text():
    assert parse_row({"messages": [user("q")], "expected_answer": 72}, "f:1").expected_answer == "72"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "messages: Field required"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": "hi"}, "messages: Input should be a valid list, got 'hi'"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role: Input should be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: Field required"),
        ({"messages": [user(3)]}, "messages[0].content: expected a string or a list of text parts, got 3"),
        ({"messages": [user([{"type": "image_url"}])]}, "messages[0].content: expected parts"),
        ({"messages": [user("\ud800")]}, "messages[0].content: holds half of a surrogate pair"),
        ({"messages": [assistant("a")]}, "nothing before the assistant's answer"),
        ({"messages": [user("q"), assistant("")]}, "final message is empty"),
        ({"messages": [user("q"), assistant("a")], "completion": "b"}, "keep one"),
        ({"messages": [user("q")], "completion": ""}, "completion: String should have at least 1"),
        ({"messages": [user("q")], "expected_answer": True}, "expected_answer: Input should be a valid str"),
        ({"messages": [user("q")], "teacher_messages": [assistant("a")]}, "teacher_messages must not end"),
        ({"messages": [user("q")], "teacher_hints": [{"messages": []}]}, "teacher_hints[0].messages"),
        ({"messages": [user("q")], "teacher_hints": [{"after_turn": 0, "messages": [user("a")]}]}, "after_turn"),
        ({"messages": [user("q")], "teacher_hints": [{"messages": [assistant("a")]}]}, "teacher_hints[0].messages[0]"),
        ({"messages": [user("q")], "teacher_hints": [{"after": 1, "messages": [user("a")]}]}, "teacher_hints[0].after"),
        ([1], "expected an object with 'messages', got [1]"),
    ],
)
def test_a_broken_row_is_refused_with_place_and_reason(record, reason):
    with pytest.raises(DataError) as error:
        parse_row(record, "rows.jsonl:7")
    assert str(error.value).startswith("rows.jsonl:7: ")
    assert reason in str(error.value)


# --- files ----------------------------------------------------------------------------------------


def test_rows_are_named_by_their_line_or_their_id(tmp_path):
    good = {"messages": [user("a\u2028b")]}
    raw = json.dumps(good, ensure_ascii=False)  # U+2028 unescaped is legal JSON and no end of line
    path = write(tmp_path / "f.jsonl", raw, "", {"id": 5, **good}, raw, end="")
    assert [r.row_id for r in read_jsonl(path)] == ["f:1", "5", "f:4"]


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": [user("q")]}).encode())
    assert len(read_jsonl(path)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"messages": [', "f.jsonl:2: not JSON"),
        (b"[\n", "f.jsonl:2: not JSON: Expecting value: line 2 column 1 (char 2); is the file one JSON array"),
        (b'{"messages": "\xff"}', "f.jsonl:2: not UTF-8 (byte 15 of the line)"),
        (b"[]", "f.jsonl:2: expected an object with 'messages'"),
        (b"null", "f.jsonl:2: expected an object with 'messages', got None"),
        (b'{"expected_answer": ' + b"9" * 5000 + b"}", "f.jsonl:2: not JSON: Exceeds the limit"),
        (
            b'{"messages": [{"role": "user", "content": "q"}], "expected_answer": Infinity}',
            "f.jsonl:2: expected_answer: Input should be a valid string, got inf",
        ),
        (b'{"id": "f:1", "messages": [{"role": "user", "content": "q"}]}', "id 'f:1' was used on line 1"),
    ],
)
def test_a_broken_line_is_refused_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "f.jsonl"
    path.write_bytes(json.dumps({"messages": [user("q")]}).encode() + b"\n" + content)
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    assert f"{tmp_path}/f.jsonl:2: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        read_jsonl(tmp_path / "f.jsonl")


def test_unknown_keys_are_named_once_per_file_with_the_nearest_name(tmp_path, caplog):
    record = {"messages": [user("q")], "teacher_mesages": [user("t")], "zzz": 1}
    with caplog.at_level(logging.WARNING):
        read_jsonl(write(tmp_path / "f.jsonl", record, record))
    (said,) = [r.getMessage() for r in caplog.records]
    assert "'teacher_mesages' in 2 row(s) (did you mean 'teacher_messages'?)" in said
    assert "'zzz' in 2 row(s)" in said and "'zzz' in 2 row(s) (did" not in said


# --- splits ---------------------------------------------------------------------------------------


def test_held_out_rows_are_disjoint_by_content_and_deterministic():
    rows = [
        Row(row_id=f"r{i}", messages=(user(f"Question  {i % 40}" if i < 40 else f"question {i % 40} "),))
        for i in range(80)
    ]
    train, test = split_held_out(rows, 10, seed=3)
    assert len(test) == 10 and len(train) == 70
    assert not {prompt_key(r) for r in train} & {prompt_key(r) for r in test}
    assert [r.row_id for r in test] == [r.row_id for r in split_held_out(rows, 10, seed=3)[1]]
    assert [r.row_id for r in test] != [r.row_id for r in split_held_out(rows, 10, seed=4)[1]]


def test_holding_out_everything_is_refused():
    with pytest.raises(DataError, match="leaves none to train on"):
        split_held_out(make_rows(5), 5, seed=0)


# --- cursor ---------------------------------------------------------------------------------------


def test_each_epoch_draws_every_row_once_in_an_order_of_its_own():
    cursor = Cursor(make_rows(20), seed=0)
    epochs = [[r.row_id for r in cursor.next(20)] for _ in range(3)]
    assert all(sorted(e) == sorted(f"r{i}" for i in range(20)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[1] != [r.row_id for r in Cursor(make_rows(20), seed=1).next(20)]


def test_batches_do_not_change_the_order_and_wrap_through_epochs():
    one, other = Cursor(make_rows(3), seed=5), Cursor(make_rows(3), seed=5)
    assert one.next(10) == [other.next(1)[0] for _ in range(10)]
    assert one.epoch == 3


def test_without_shuffle_rows_come_in_file_order():
    assert [r.row_id for r in Cursor(make_rows(3), seed=0, shuffle=False).next(4)] == ["r0", "r1", "r2", "r0"]


@pytest.mark.parametrize("drawn", [0, 4, 7, 18])
def test_a_restored_cursor_draws_what_the_uninterrupted_one_would(drawn):
    whole = Cursor(make_rows(7), seed=2)
    whole.next(drawn)
    state = json.loads(json.dumps(whole.state()))
    restored = Cursor(make_rows(7), seed=2)
    restored.next(3)  # whatever it drew before is forgotten
    restored.load_state(state)
    assert restored.next(25) == whole.next(25)


@pytest.mark.parametrize(
    "other",
    [
        Cursor(make_rows(8), seed=2),
        Cursor(make_rows(7), seed=3),
        Cursor(make_rows(7), seed=2, shuffle=False),
        Cursor([*make_rows(6), Row("r6", (user("edited"),))], seed=2),
        Cursor(list(reversed(make_rows(7))), seed=2),
    ],
    ids=["rows", "seed", "shuffle", "content", "order"],
)
def test_a_cursor_refuses_the_state_of_other_data(other):
    with pytest.raises(DataError, match="must be the same to continue"):
        other.load_state(Cursor(make_rows(7), seed=2).state())


def test_a_corrected_expected_answer_does_not_stop_a_resume():
    rows = make_rows(2)
    cursor = Cursor([Row(r.row_id, r.messages, expected_answer="1") for r in rows], seed=0)
    cursor.load_state(Cursor(rows, seed=0).state())


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        Cursor([], seed=0)


# --- sources --------------------------------------------------------------------------------------

GSM8K = [{"question": f"What is {i}?", "answer": f"Easy <<{i}>>.\n#### 1,{i:03d}"} for i in range(30)]


def load(dataset, path=None, eval_size=5, seed=0, max_rows=None):
    return load_dataset_rows(
        str(dataset), str(path) if path else None, eval_size=eval_size, seed=seed, max_rows=max_rows
    )


@pytest.fixture(params=["jsonl", "parquet", "snapshot", "save_to_disk"])
def gsm8k_copy(request, tmp_path, monkeypatch):
    """GSM8K's own fields in each layout that a local copy may have."""
    train, test = hf.Dataset.from_list(GSM8K[:20]), hf.Dataset.from_list(GSM8K[20:])
    path = tmp_path / "copy"
    match request.param:
        case "jsonl":
            path.mkdir()
            write(path / "train.jsonl", *GSM8K[:20])
            write(path / "test.jsonl", *GSM8K[20:])
        case "parquet":
            path.mkdir()
            train.to_parquet(path / "train-00000-of-00001.parquet")
            test.to_parquet(path / "test-00000-of-00001.parquet")
        case "snapshot":
            (path / "main").mkdir(parents=True)
            (path / "socratic").mkdir()
            train.to_parquet(path / "main" / "train-00000-of-00001.parquet")
            test.to_parquet(path / "main" / "test-00000-of-00001.parquet")
            test.to_parquet(path / "socratic" / "train-00000-of-00001.parquet")
        case "save_to_disk":
            hf.DatasetDict({"train": train, "test": test}).save_to_disk(path)
    return path


def test_a_local_copy_of_gsm8k_in_any_layout(gsm8k_copy):
    data = load("gsm8k", gsm8k_copy, eval_size=4)
    assert (data.name, data.grader, len(data.train), len(data.test)) == ("gsm8k", "math", 20, 4)
    assert data.train[1].messages == (user("What is 1?" + BOXED_INSTRUCTION),)
    assert data.train[1].expected_answer == "1001"
    assert {r.expected_answer for r in data.test} < {f"1{i:03d}" for i in range(20, 30)}


def test_samples_are_seeded_and_not_the_first_rows(gsm8k_copy):
    some = load("gsm8k", gsm8k_copy, seed=1, max_rows=6)
    assert len(some.train) == 6
    assert some == load("gsm8k", gsm8k_copy, seed=1, max_rows=6)
    assert some.train != load("gsm8k", gsm8k_copy, seed=2, max_rows=6).train
    assert some.train != load("gsm8k", gsm8k_copy).train[:6]


def test_a_named_dataset_reads_a_copy_in_the_jsonl_contract(tmp_path):
    rows = [{"messages": [user(f"q{i}")], "teacher_messages": [user("t")], "expected_answer": "x"} for i in range(9)]
    data = load("gsm8k", write(tmp_path / "f.jsonl", *rows), eval_size=2)
    assert len(data.train) == 7 and len(data.test) == 2 and data.grader == "math"
    assert data.train[0].messages[0]["content"].startswith("q")  # as written: no instruction is added
    assert data.train[0].teacher_messages == (user("t"),)


def test_a_jsonl_contract_survives_a_parquet_round_trip(tmp_path):
    rows = [{"messages": [user("a")], "teacher": "t"}, {"messages": [user("b"), assistant("c")]}]
    hf.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    data = load(tmp_path / "train.parquet", eval_size=0)
    assert [(r.messages, r.teacher, r.completion) for r in data.train] == [
        ((user("a"),), "t", None),
        ((user("b"),), None, "c"),
    ]


def test_deepmath_reads_its_two_columns(tmp_path):
    record = {"question": "Evaluate", "final_answer": "\\dfrac{3}{4}", "r1_solution_1": "long", "topic": "t"}
    hf.Dataset.from_list([record]).to_parquet(tmp_path / "train.parquet")
    (row,) = load("deepmath", tmp_path, eval_size=0).train
    assert row == Row(
        row_id="deepmath/train:0",
        messages=(user("Evaluate\nWrite your answer in \\boxed{} format."),),
        expected_answer="\\dfrac{3}{4}",
    )


def test_tulu3_prompts_end_at_the_last_user_message(tmp_path, caplog):
    talk = [{"role": "system", "content": "s"}, user("1"), assistant("2"), user("3"), assistant("4")]
    records = [
        {"id": "x", "messages": talk, "source": "s"},
        {"id": "y", "messages": [user("only")], "source": "s"},
        {"id": "z", "messages": [assistant("nobody asked")], "source": "s"},
    ]
    expected = [(tuple(talk[:4]), "4"), ((user("only"),), None)]
    hf.Dataset.from_list(records).to_parquet(tmp_path / "train.parquet")
    for path in (write(tmp_path / "f.jsonl", *records), tmp_path / "train.parquet"):
        caplog.clear()
        data = load("tulu3", path, eval_size=0)
        assert [(r.messages, r.completion) for r in data.train] == expected
        assert "left out 1 records without a prompt" in caplog.text


def test_every_row_of_a_jsonl_file_is_checked_even_when_few_are_used(tmp_path):
    path = write(tmp_path / "f.jsonl", *[{"messages": [user(str(i))]} for i in range(50)], {"messages": []})
    with pytest.raises(DataError, match=r"f\.jsonl:51: messages"):
        load(path, max_rows=1)


def test_prompts_of_test_are_taken_out_of_train(tmp_path, caplog):
    write(tmp_path / "train.jsonl", *[{"messages": [user(f"q{i}")]} for i in range(5)])
    write(tmp_path / "test.jsonl", {"messages": [user("Q3 ")]})
    data = load(tmp_path)
    assert [r.messages[0]["content"] for r in data.train] == ["q0", "q1", "q2", "q4"]
    assert "took 1 train rows out" in caplog.text


@pytest.mark.parametrize(
    ("answers", "grader"), [(["72", "1/2"], "math"), (["72", "Paris"], "exact"), ([None], "exact")]
)
def test_a_path_is_graded_as_mathematics_if_all_answers_are_numbers(tmp_path, answers, grader):
    rows = [{"messages": [user(str(i))], "expected_answer": a} for i, a in enumerate(answers)]
    assert load(write(tmp_path / "my.jsonl", *rows), eval_size=0).grader == grader


@pytest.mark.parametrize(
    ("dataset", "path", "message"),
    [
        ("gsm9k", None, r"'gsm9k' is not known; did you mean 'gsm8k'\? Expected one of arithmetic, deepmath"),
        ("zzz", None, "or the path of a JSONL file"),
        ("nowhere.jsonl", None, "nowhere.jsonl: no such file"),
        ("gsm8k", "/no/such/folder", "dataset_path=/no/such/folder: no such file or folder"),
    ],
)
def test_what_cannot_be_found_is_refused(dataset, path, message):
    with pytest.raises(DataError, match=message):
        load(dataset, path)


def test_foreign_records_and_folders_are_refused(tmp_path):
    path = write(tmp_path / "f.jsonl", {"prompt": "q", "answer": "a"})
    with pytest.raises(
        DataError, match=r"f\.jsonl:1: expected gsm8k's fields question, answer, .* found answer, prompt"
    ):
        load("gsm8k", path)
    with pytest.raises(DataError, match=r"f\.jsonl:1: answer has no '####'"):
        load("gsm8k", write(tmp_path / "f.jsonl", {"question": "q", "answer": "a"}))
    with pytest.raises(DataError, match=r"expected train\.jsonl"):
        load("gsm8k", tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as parquet"):
        load("gsm8k", tmp_path / "bad.parquet")


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(hf, "load_dataset", offline)
    with pytest.raises(DataError, match=r"openai/gsm8k could not be loaded.*Couldn't reach.*dataset_path="):
        load("gsm8k")


def test_the_hub_is_asked_for_each_source_as_it_is_published(monkeypatch):
    asked = []

    def hub(*args, split):
        asked.append((*args, split))
        return hf.Dataset.from_list([{**GSM8K[len(asked)], "final_answer": "1", "messages": [user("q")]}])

    monkeypatch.setattr(hf, "load_dataset", hub)
    for name in sources.SOURCES:
        load(name, eval_size=0)
    assert asked == [
        ("zwhe99/DeepMath-103K", None, "train"),
        ("allenai/tulu-3-sft-mixture", None, "train"),
        ("open-thoughts/OpenThoughts3-1.2M", None, "train"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
    ]
