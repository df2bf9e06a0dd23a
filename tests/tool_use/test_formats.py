"""Reading calls from text: what is a call, what is text, what cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import TEMPLATES, renderer_of

from tool_use import formats, qwen_xml
from tool_use.formats import RawTurn, opens_thinking, split_thinking

SCHEMAS: dict[str, Any] = {
    "run": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "n": {"type": "integer"},
            "x": {"type": "number"},
            "yes": {"type": "boolean"},
            "items": {"type": "array"},
            "object": {"type": "object"},
            "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            "choice": {"enum": ["a", 1, None]},
            "several": {"type": ["integer", "string"]},
            "any": {},
        },
    }
}
HERMES_CALL = '<tool_call>\n{"name": "run", "arguments": {"text": "a"}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=run>\n<parameter=text>\na\n</parameter>\n</function>\n</tool_call>"
LLAMA_CALL = '{"name": "run", "parameters": {"text": "a"}}'
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "run", "arguments": {"text": "a"}, "id": "abcdefgh1"}]'
NAMED_CALL = '[TOOL_CALLS]run[ARGS]{"text": "a"}'

FORMATS = {
    "hermes": (formats.parse_hermes, HERMES_CALL),
    "qwen_xml": (qwen_xml.parse, XML_CALL),
    "llama3_json": (formats.parse_llama3_json, LLAMA_CALL),
    "mistral_list": (formats.parse_mistral, MISTRAL_CALL),
    "mistral_named": (formats.parse_mistral, NAMED_CALL),
}
ALL = pytest.mark.parametrize("format", FORMATS)
TAGGED = pytest.mark.parametrize("format", [name for name in FORMATS if name != "llama3_json"])


def read(format: str, text: str) -> RawTurn:
    return FORMATS[format][0](text, SCHEMAS)


def calls(turn: RawTurn) -> list[tuple[str, dict[str, Any]]]:
    assert turn.malformed == []
    return [(call.name, dict(call.arguments)) for call in turn.calls]


def problem(turn: RawTurn) -> str:
    assert turn.calls == []
    (found,) = turn.malformed
    return found.error


A_CALL = ("run", {"text": "a"})

# --- what every format does


@ALL
def test_a_call_alone_and_behind_text(format: str):
    written = FORMATS[format][1]
    assert calls(read(format, written)) == [A_CALL]
    turn = read(format, f"I will look.\n{written}")
    assert (calls(turn), turn.content) == ([A_CALL], "I will look.\n")
    assert calls(read(format, f"\n\n{written}\n")) == [A_CALL]


@ALL
def test_text_without_a_call_is_text(format: str):
    for text in ("", "Done.", 'The answer is {"x": 1}.', '{"answer": 3}', "a < b, [1] and <b>", "{", "<tool_calls>"):
        turn = read(format, text)
        assert (calls(turn), turn.content) == ([], text)


@ALL
def test_a_call_in_a_fenced_code_block_is_text(format: str):
    written = FORMATS[format][1]
    for text in (
        f"As this:\n```json\n{written}\n```\nNow you.",
        f"~~~~\n{written}\n~~~\nstill inside\n~~~~",
        f"   ```\n{written}",  # not closed: to the end
    ):
        turn = read(format, text)
        assert (calls(turn), turn.content) == ([], text)
    assert calls(read(format, f"```\nls\n```\n{written}")) == [A_CALL]
    assert calls(read(format, f"Use `ls`, then\n{written}")) == [A_CALL]


@TAGGED
def test_a_call_right_behind_a_backtick_is_text(format: str):
    text = f"Write `{FORMATS[format][1]}` for a call."
    assert calls(read(format, text)) == [] and read(format, text).content == text


@ALL
def test_a_call_inside_of_thinking_is_no_call(format: str):
    written = FORMATS[format][1]
    for start, end in (("<think>", "</think>"), ("[THINK]", "[/THINK]")):
        thought = f"{start}\nmaybe {written}?\n{end}"
        thinking, rest = split_thinking(f"{thought}\n\nNo.", inside=False)
        assert (thinking, rest) == (f"maybe {written}?", "\n\nNo.")
        turn = read(format, f"First.\n{thought}\n{written}")  # between two pieces of text, too
        assert calls(turn) == [A_CALL]
        assert written in turn.thinking and "maybe" not in turn.content


@ALL
def test_a_call_that_is_cut_anywhere_is_never_made(format: str):
    written = FORMATS[format][1]
    for cut in range(len(written)):
        turn = read(format, written[:cut])
        if format != "mistral_named" or "{" in written[:cut]:
            assert turn.calls == [], written[:cut]
        assert len(turn.malformed) <= 1
    # cut in its arguments, it is a call that cannot be read
    assert len(read(format, written[: written.rindex("a") - 1]).malformed) == 1


@ALL
def test_what_cannot_be_read_stays_in_the_text_and_its_name_is_known(format: str):
    written = FORMATS[format][1]
    cut = written[: written.rindex("a") + 1]
    turn = read(format, f"Hm.\n{cut}")
    assert turn.content == f"Hm.\n{cut}"
    assert turn.malformed[0].name == ("tool" if format == "mistral_named" else "run")


def test_nothing_is_too_deep_or_too_large():
    for text in (
        "[" * 100_000,
        '{"name": "run", "arguments": ' + '{"a":' * 100_000,
        '{"name": "run", "arguments": {"n": ' + "9" * 5000 + "}}",
    ):
        assert problem(formats.parse_hermes(f"<tool_call>{text}</tool_call>", SCHEMAS))
        assert len(formats.parse_mistral(f"[TOOL_CALLS]{text}", SCHEMAS).malformed) == 1
        formats.parse_llama3_json(text, SCHEMAS)


# --- Hermes


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name":"run","arguments":{"text":"a"}}', {"text": "a"}),
        ('\n\n  {"arguments": {"text": "a"}, "name": "run"}  \n', {"text": "a"}),
        ('{"name": "run", "arguments": "{\\"text\\": \\"a\\"}"}', {"text": "a"}),
        ('{"name": "run", "parameters": {"text": "a"}}', {"text": "a"}),
        ('{"name": "run", "arguments": null}', {}),
        ('{"name": "run"}', {}),
        ('{"name": "run", "arguments": ""}', {}),
        ('{"name": "run", "arguments": {"text": "日本 \\u00fc ü"}}', {"text": "日本 ü ü"}),
        ('{"name": "run", "arguments": {"text": "</tool_call>{}}}"}}', {"text": "</tool_call>{}}}"}),
        ('{"name": "run", "arguments": {"text": "two\nlines"}}', {"text": "two\nlines"}),
        ('{"name": "run", "arguments": {"object": {"a": [{"b": {}}]}}}', {"object": {"a": [{"b": {}}]}}),
        ('{"name": "run", "arguments": {"text": "```\\n<tool_call>"}}', {"text": "```\n<tool_call>"}),
    ],
)
def test_hermes_reads(body: str, arguments: dict[str, Any]):
    assert calls(formats.parse_hermes(f"<tool_call>{body}</tool_call>", SCHEMAS)) == [("run", arguments)]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("", "not valid JSON"),
        ("run(a)", "not valid JSON: Expecting value at 'run(a)</tool_call>'"),
        ("{'name': 'run'}", "not valid JSON: Expecting property name"),
        ('{"name": "run", "arguments": {"text": "a"}}}', "expected </tool_call> and got '}</tool_call>'"),
        ('{"name": "run", "arguments": [1]}', 'the "arguments" of run must be a JSON object, got [1]'),
        ('{"name": "run", "arguments": "text=a"}', 'the "arguments" of run are a string that is not valid JSON'),
        ('{"arguments": {}}', 'a call needs a "name"'),
        ('{"name": 3}', 'a call needs a "name"'),
        ('["run"]', 'must be a JSON object with "name" and "arguments", got ["run"]'),
    ],
)
def test_hermes_says_what_is_wrong_and_goes_on_behind_it(body: str, told: str):
    broken = f"<tool_call>{body}</tool_call>"
    assert told in problem(formats.parse_hermes(broken, SCHEMAS))
    turn = formats.parse_hermes(f"{broken}\n{HERMES_CALL}", SCHEMAS)
    assert (len(turn.malformed), [c.name for c in turn.calls]) == (1, ["run"])


def test_several_hermes_calls_in_one_turn():
    turn = formats.parse_hermes(f"One{HERMES_CALL}two{HERMES_CALL}\n{HERMES_CALL}three", SCHEMAS)
    assert (calls(turn), turn.content) == ([A_CALL] * 3, "Onetwo\nthree")


# --- Qwen's XML


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "3", "3"),
        ("text", "null", "null"),
        ("text", " kept \n\n", " kept \n\n"),
        ("text", "", ""),
        ("text", "</parameter> </tool_call>", "</parameter> </tool_call>"),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("n", "3", 3),
        ("n", "three", "three"),
        ("x", "1.5", 1.5),
        ("x", "2", 2),
        ("x", "1e3", 1000.0),
        ("yes", "True", True),
        ("yes", "false", False),
        ("yes", "1", "1"),
        ("items", "[1, 'a']", "[1, 'a']"),
        ("items", '[1, "a"]', [1, "a"]),
        ("object", '{"a": null}', {"a": None}),
        ("maybe", "None", None),
        ("maybe", "4", 4),
        ("either", "4", 4),
        ("either", "four", "four"),
        ("choice", "a", "a"),
        ("choice", "1", 1),
        ("choice", "null", None),
        ("several", "x", "x"),
        ("any", "[1]", [1]),
        ("any", "x", "x"),
        ("unknown", "5", 5),
    ],
)
def test_xml_values_have_the_types_of_the_schema(key: str, text: str, value: Any):
    written = f"<tool_call>\n<function=run>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    (found,) = calls(qwen_xml.parse(written, SCHEMAS))
    assert found == ("run", {key: value}) and type(found[1][key]) is type(value)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{"name": "run"}', "expected <function=name>"),
        ("<function=run>\n<parameter=text>\na\n", "'text' of run is not closed"),
        ("<function=run>\n<parameter=text>\na\n</parameter>\n", "'text' of run is not closed"),
        ("<function=run>\n</tool_call>", "the call of run is not closed"),
        ("<function=run>\njunk</function>\n</tool_call>", "the call of run is not closed"),
    ],
)
def test_xml_says_what_is_wrong(body: str, told: str):
    assert told in problem(qwen_xml.parse(f"<tool_call>\n{body}", SCHEMAS))


def test_several_xml_calls_compact_and_without_parameters():
    compact = "<tool_call><function=run><parameter=n>1</parameter><parameter=text>b</parameter></function></tool_call>"
    empty = "<tool_call>\n<function=stop>\n</function>\n</tool_call>"
    assert calls(qwen_xml.parse(f"{compact}\n{empty}{XML_CALL}", SCHEMAS)) == [
        ("run", {"n": 1, "text": "b"}),
        ("stop", {}),
        A_CALL,
    ]


# --- Llama 3


@pytest.mark.parametrize(
    "text",
    [
        f"<|python_tag|>{LLAMA_CALL}",
        f"<|python_tag|>{LLAMA_CALL}<|eom_id|>",
        f"{LLAMA_CALL}<|eot_id|>",
        '{"type": "function", "name": "run", "parameters": {"text": "a"}}',
        '{"name": "run", "arguments": {"text": "a"}}',
        '  {\n  "name": "run",\n  "parameters": {"text": "a"}\n}',
    ],
)
def test_llama_calls(text: str):
    assert calls(formats.parse_llama3_json(text, SCHEMAS)) == [A_CALL]


def test_several_llama_calls():
    for between in ("; ", ";\n", "\n", ""):
        assert calls(formats.parse_llama3_json(LLAMA_CALL + between + LLAMA_CALL, SCHEMAS)) == [A_CALL, A_CALL]


@pytest.mark.parametrize("text", ['{"name": "Ada"}', '{"a": 1}', "{broken", 'It is {"name": "run", "parameters": {}}'])
def test_an_answer_in_json_is_no_llama_call(text: str):
    turn = formats.parse_llama3_json(text, SCHEMAS)
    assert (calls(turn), turn.content) == ([], text)


@pytest.mark.parametrize(
    "text", ["<|python_tag|>print(1)", '{"name": "run", "parameters": {"text": "a}', '{"name": "run", "par']
)
def test_a_broken_llama_call_is_told(text: str):
    assert problem(formats.parse_llama3_json(text, SCHEMAS))


# --- Mistral


def test_mistral_ids_are_kept_if_mistrals_templates_take_them():
    written = '[TOOL_CALLS][{"name": "run", "arguments": {}, "id": "%s"}]'
    for call_id, kept in (("Ab3defgh1", "Ab3defgh1"), ("short", None), ("too-long-and-odd", None)):
        (call,) = formats.parse_mistral(written % call_id, SCHEMAS).calls
        assert call.id == kept
    (call,) = formats.parse_mistral('[TOOL_CALLS]run[CALL_ID]Ab3defgh1[ARGS]{"n": 1}', SCHEMAS).calls
    assert (call.id, call.arguments) == ("Ab3defgh1", {"n": 1})


def test_several_mistral_calls():
    both = '[TOOL_CALLS] [{"name": "run", "arguments": {"text": "]"}}, {"name": "run", "arguments": "{\\"n\\": 1}"}]'
    assert calls(formats.parse_mistral(both, SCHEMAS)) == [("run", {"text": "]"}), ("run", {"n": 1})]
    for between in ("", "\n"):
        assert calls(formats.parse_mistral(f"{NAMED_CALL}{between}{NAMED_CALL}", SCHEMAS)) == [A_CALL, A_CALL]
    assert calls(formats.parse_mistral('[TOOL_CALLS]run{"text": "a"}', SCHEMAS)) == [A_CALL]


@pytest.mark.parametrize(
    "text", ["[TOOL_CALLS]", "[TOOL_CALLS] run it", '[TOOL_CALLS] [{"name": "run", ]', "[TOOL_CALLS]run[ARGS]{"]
)
def test_a_broken_mistral_call_is_told(text: str):
    assert problem(formats.parse_mistral(text, SCHEMAS))
    turn = formats.parse_mistral(f"{text}{NAMED_CALL}", SCHEMAS)
    assert len(turn.malformed) >= 1


# --- thinking that the prompt has begun


def test_thinking_that_the_template_opened():
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thinking("<|im_start|>assistant\n")
    assert split_thinking("hm\n</think>\n\nyes", inside=True) == ("hm", "\n\nyes")
    assert split_thinking(f"hm {HERMES_CALL}", inside=True) == (f"hm {HERMES_CALL}", "")
    assert split_thinking("<think>never ends", inside=False) == ("never ends", "")
    assert split_thinking("a </think> b", inside=False) == ("", "a </think> b")


# --- what a template writes is read back


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,15}", fullmatch=True)
TRICKY = st.sampled_from(
    ["</tool_call>", "<tool_call>", "```", "</parameter>", "</function>", "[TOOL_CALLS]", "[ARGS]", "<|im_end|>", "`",
     '"', "\\", "{", "}", "[", "\n", "<|python_tag|>", "</think>", "<think>", "null", "日本", "\u2028", ";"]
)  # fmt: skip
TEXTS = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), TRICKY), max_size=6).map(
    "".join
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
JSON_CALLS = st.tuples(NAMES, st.dictionaries(TEXTS, JSON, max_size=4))


def written_by_template(name: str, made: list[tuple[str, dict[str, Any]]]) -> str:
    """The assistant's turn as the template writes it, without its end of turn."""
    renderer: Any = renderer_of(name)
    tool_calls = [
        {"id": f"call{i:05d}", "type": "function", "function": {"name": n, "arguments": a}}
        for i, (n, a) in enumerate(made)
    ]
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "", "tool_calls": tool_calls}]
    whole = renderer.tokenizer.apply_chat_template(messages, tokenize=False)
    text = whole.partition("question")[2].removeprefix(renderer.header)
    ends = ["<|im_end|>\n", "<|eom_id|>", "<|endoftext|>"]
    return next(text.removesuffix(end) for end in ends if text.endswith(end))


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n != "qwen_xml"])
@settings(deadline=None, max_examples=60)
@given(made=st.lists(JSON_CALLS, min_size=1, max_size=3))
def test_a_call_written_by_the_template_is_read_as_it_was(name: str, made: list[tuple[str, dict[str, Any]]]):
    if name == "llama3_json":
        made = made[:1]
    parse = {"hermes": formats.parse_hermes, "llama3_json": formats.parse_llama3_json}.get(name, formats.parse_mistral)
    _, said = split_thinking(written_by_template(name, made), inside=False)
    assert calls(parse(said, {})) == made


PLAIN = TEXTS.filter(lambda t: "</parameter>" not in t)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "text": PLAIN,
        "n": st.integers(),
        "x": st.floats(allow_nan=False, allow_infinity=False),
        "yes": st.booleans(),
        "items": st.lists(JSON, max_size=3).filter(lambda v: "</parameter>" not in json.dumps(v)),
        "object": st.dictionaries(TEXTS, JSON, max_size=3).filter(lambda v: "</parameter>" not in json.dumps(v)),
        "maybe": st.none() | st.integers(),
    },
)


@settings(deadline=None, max_examples=100)
@given(made=st.lists(st.tuples(st.just("run"), VALUES), min_size=1, max_size=3))
def test_xml_calls_written_by_the_template_are_read_as_they_were(made: list[tuple[str, dict[str, Any]]]):
    assert calls(qwen_xml.parse(written_by_template("qwen_xml", made), SCHEMAS)) == made


@ALL
@settings(deadline=None, max_examples=100)
@given(text=st.lists(st.one_of(TEXTS, st.sampled_from([v[1] for v in FORMATS.values()])), max_size=5).map("".join))
def test_any_text_can_be_read(format: str, text: str):
    turn = read(format, text)
    for call in turn.calls:
        json.dumps(dict(call.arguments))
    if not turn.calls and not turn.thinking:
        assert turn.content == (text.removesuffix("<|eom_id|>").removesuffix("<|eot_id|>"))


# --- Qwen3-Coder without the opening tag

BARE = "<function=run>\n<parameter=text>\na\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>"


@pytest.mark.parametrize("text", [BARE, f"{BARE}\n</tool_call>", f"I run it.\n\n  {BARE}\n</tool_call>"])
def test_a_whole_function_without_the_opening_tag_is_a_call(text: str):
    turn = read("qwen_xml", text)
    assert calls(turn) == [("run", {"text": "a", "n": 3})]
    assert turn.content.strip() == text.partition("<function")[0].strip()


def test_functions_with_and_without_the_tag_are_calls_in_their_order():
    turn = read("qwen_xml", f"{XML_CALL}\n{BARE}\n</tool_call>\n{BARE}\n{XML_CALL}")
    assert [arguments.get("n") for _, arguments in calls(turn)] == [None, 3, 3, None]


@pytest.mark.parametrize(
    "text",
    [
        f"Write `{BARE}`",
        f"```\n{BARE}\n```",
        "<function=run>\n<parameter=text>\na",
        "<function=run> is how a call begins.",
        f"Like so: {BARE}",
    ],
)
def test_what_is_no_whole_function_at_the_beginning_of_a_line_stays_text(text: str):
    turn = read("qwen_xml", text)
    assert (turn.calls, turn.malformed, turn.content) == ([], [], text)
