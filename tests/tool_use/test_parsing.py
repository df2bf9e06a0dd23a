"""Which format a template has, and the ids that calls get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import small_tokenizers as small
from scripted import HERMES, PREFILLED_THINKING, QWEN_XML, TEMPLATES, renderer_of, tokenizer_of

from envs.message_env import MalformedCall
from envs.rendering import make_renderer
from errors import TemplateError
from tool_use import parsing, register_tool_parser, tool
from tool_use.formats import RawCall, RawTurn
from tool_use.parsing import detect_format, make_parser


@tool
def run(text: str = "", n: int = 0) -> str:
    return text


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    yield
    parsing._registered.clear()
    parsing._formats.clear()


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("hermes", "hermes"),
        ("qwen_xml", "qwen_xml"),
        ("llama3_json", "llama3_json"),
        ("mistral_list", "mistral"),
        ("mistral_named", "mistral"),
    ],
)
def test_the_format_is_found_by_what_the_template_writes(name: str, format: str):
    assert detect_format(renderer_of(name)).name == format


def test_a_format_is_not_found_in_what_the_template_says_about_tools():
    says = "{{- 'Answer as <tool_call>{\"name\": …}</tool_call> or [TOOL_CALLS]' -}}"
    assert detect_format(make_renderer(tokenizer_of(says + QWEN_XML))).name == "qwen_xml"


def test_an_unknown_format_is_refused_with_the_way_out():
    odd = HERMES.replace("<tool_call>", "<<call>>")
    with pytest.raises(TemplateError, match=r"<<call>>.*none of hermes, qwen_xml.*register_tool_parser"):
        make_parser(make_renderer(tokenizer_of(odd)), [run])


def test_a_template_without_tools_and_one_that_is_missing_are_refused():
    with pytest.raises(TemplateError, match="does not show tools"):
        make_parser(make_renderer(small.byte_level(small.CHATML)), [run])
    with pytest.raises(TemplateError, match="no chat template, so there is no format for tools"):
        make_parser(make_renderer(small.byte_level()), [run])


def shouted(text: str, schemas: Any) -> RawTurn:
    content, _, call = text.partition("<<call>>")
    return RawTurn(content=content, calls=[RawCall(call, {"names": list(schemas)}, id="own-id")] if call else [])


def test_a_registered_format_is_asked_first_and_may_bring_ids_of_its_own():
    register_tool_parser("shouted", lambda written: "<<call>>" in written and "look_up" in written, shouted)
    renderer = make_renderer(tokenizer_of(HERMES.replace("<tool_call>", "<<call>>")))
    turn = make_parser(renderer, [run])("Hm. <<call>>run")
    assert (turn.content, turn.tool_calls[0]["id"]) == ("Hm.", "own-id")
    assert turn.tool_calls[0]["function"] == {"name": "run", "arguments": {"names": ["run"]}}
    assert make_parser(renderer_of("hermes"), [run]).format.name == "hermes"
    register_tool_parser("mine", lambda written: "<tool_call>" in written, shouted)
    assert make_parser(renderer_of("hermes"), [run]).format.name == "mine"
    register_tool_parser("mine", lambda written: False, shouted)  # replaces the first
    assert make_parser(renderer_of("hermes"), [run]).format.name == "hermes"


# --- ids


def hermes_call(**fields: Any) -> str:
    return f"<tool_call>{json.dumps({'name': 'run', 'arguments': {}} | fields)}</tool_call>"


def test_every_call_of_an_episode_has_an_id_of_its_own_that_any_template_takes():
    parse = make_parser(renderer_of("hermes"), [run])
    turns = [parse(hermes_call() * 2), parse(hermes_call()), make_parser(renderer_of("hermes"), [run])(hermes_call())]
    ids = [call["id"] for turn in turns for call in turn.tool_calls]
    assert ids == ["call00001", "call00002", "call00003", "call00001"]  # the last is another episode's
    assert parse.placeholder(MalformedCall("x", "run"))["id"] == "call00004"


def test_an_id_that_the_model_uses_twice_is_replaced():
    parse = make_parser(renderer_of("mistral_list"), [run])
    one = {"name": "run", "arguments": {}, "id": "abcdefgh1"}
    turn = parse("[TOOL_CALLS]" + json.dumps([one, one, one | {"id": "call00001"}]))
    ids = [call["id"] for call in turn.tool_calls]
    assert ids[0] == "abcdefgh1" and len(set(ids)) == 3
    (again,) = parse("[TOOL_CALLS]" + json.dumps([one])).tool_calls
    assert again["id"] not in ids
    assert all(len(i) == 9 for i in [*ids, again["id"]])


# --- thinking


def test_thinking_is_kept_apart_also_if_the_template_has_begun_it():
    thought = f"maybe {hermes_call()}"
    turn = make_parser(renderer_of("hermes"), [run])(f"<think>\n{thought}\n</think>\n\nNo.")
    assert (turn.thinking, turn.content, turn.tool_calls) == (thought, "No.", ())
    assert turn.message == {"role": "assistant", "content": "No.", "reasoning_content": thought}
    parse = make_parser(make_renderer(tokenizer_of(PREFILLED_THINKING)), [run])
    assert len(parse(f"{thought}\n</think>\n\n{hermes_call()}").tool_calls) == 1
    assert parse(f"{thought}") == parse(f"{thought}\n")  # it never stopped thinking
    assert parse(f"{thought}").tool_calls == ()


# --- the tokenizer's own response template

RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<<call>>",
            "close": "<</call>>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


def declared() -> Any:
    tokenizer = tokenizer_of(HERMES.replace("<tool_call>", "<<call>>").replace("</tool_call>", "<</call>>"))
    tokenizer.response_template = RESPONSE
    return make_renderer(tokenizer)


def test_a_declared_response_template_is_used():
    parse = make_parser(declared(), [run])
    assert parse.format.name == "response_template"
    turn = parse('<think>\nhm\n</think>Yes\n<<call>>{"name": "run", "arguments": {"n": "3", "text": "4"}}<</call>>')
    assert (turn.content, turn.thinking) == ("Yes", "hm")
    (call,) = turn.tool_calls
    assert call["function"] == {"name": "run", "arguments": {"n": 3, "text": "4"}}  # typed by the schema
    assert call["id"] == "call00001"
    assert parse("Just text").content == "Just text"


@pytest.mark.parametrize("text", ['<<call>>{"name": "run", "argum', "<<call>>run()<</call>>", "<<call>>[]<</call>>"])
def test_what_a_declared_response_template_cannot_read_is_malformed(text: str):
    turn = make_parser(declared(), [run])(text)
    assert (turn.tool_calls, len(turn.malformed)) == ((), 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_parsing_needs_no_tools_to_know_what_a_call_is(name: str):
    assert make_parser(renderer_of(name), [])("text").tool_calls == ()
