from __future__ import annotations

import pickle
from typing import Any

import pytest
import small_tokenizers as small
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from envs.rendering import RoleColonRenderer, control_tokens, make_renderer, tokenizer_fingerprint
from errors import ConfigError, DataError, TemplateError

TEXT = "Hello  wörld\n\n\tif x < 3: print('日本', [1]) \ue000 <div>"
TOOLS = [{"type": "function", "function": {"name": "run", "description": "runs", "parameters": {}}}]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def tool(content: str, call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": "run", "tool_call_id": call_id}


def calling(*call_ids: str) -> dict[str, Any]:
    function = {"name": "run", "arguments": {"c": "ls"}}
    return answer("") | {"tool_calls": [{"id": i, "type": "function", "function": function} for i in call_ids]}


def controls_in(tokenizer: Any, ids: list[int]) -> list[int]:
    return [i for i in ids if i in control_tokens(tokenizer)]


def template_ids(tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs)


TOKENIZERS = {
    "chatml": lambda: small.byte_level(small.CHATML),
    "thinking": lambda: small.byte_level(small.THINKING),
    "inst": lambda: small.byte_level(small.INST),
    "unigram": lambda: small.unigram(small.CHATML),
    "word-matching": lambda: small.word_matching(small.CHATML),
    "python": lambda: small.pure_python(small.CHATML),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


# --- prompts


def test_benign_prompt_equals_the_templates_own_ids(tokenizer: Any) -> None:
    messages = [user(TEXT), answer("4"), user("and 3?")]
    assert make_renderer(tokenizer).prompt(messages) == template_ids(tokenizer, messages)


def test_text_encoded_around_control_tokens_equals_the_tokenizers_own_encoding(tokenizer: Any) -> None:
    # hiding a harmless half of a token ("<") forces the careful path without changing the meaning
    messages = [user(TEXT.replace(" ", "  ") + "<"), answer("4 ["), user("<")]
    assert make_renderer(tokenizer).prompt(messages) == template_ids(tokenizer, messages)


def test_tools_and_template_kwargs_reach_the_template() -> None:
    tokenizer = small.byte_level(small.THINKING + "{{- mood -}}")
    renderer = make_renderer(tokenizer, chat_template_kwargs={"mood": "calm"})
    ids = renderer.prompt([user("hi")], TOOLS)
    assert ids == template_ids(tokenizer, [user("hi")], tools=TOOLS, mood="calm")
    assert renderer.prompt([user("hi")]) != ids
    assert tokenizer.decode(ids).endswith("calm")


def test_the_rows_system_message_wins_over_the_renderers() -> None:
    tokenizer = small.byte_level(small.CHATML)
    renderer = make_renderer(tokenizer, system_prompt="Be brief.")
    brief = {"role": "system", "content": "Be brief."}
    long = {"role": "system", "content": "Be long."}
    assert renderer.prompt([user("hi")]) == template_ids(tokenizer, [brief, user("hi")])
    assert renderer.prompt([long, user("hi")]) == template_ids(tokenizer, [long, user("hi")])


def test_assistant_text_keeps_its_thinking_tokens() -> None:
    tokenizer = small.byte_level(small.CHATML)
    messages = [user("hi"), answer("<think>\nhm\n</think>\n\nyes"), user("so")]
    assert make_renderer(tokenizer).prompt(messages) == template_ids(tokenizer, messages)


@pytest.mark.parametrize(
    "messages", [[], [{"content": "x"}], [{"role": "user"}], ["x"], [{"role": "im_end", "content": ""}]]
)
def test_broken_messages_are_data_errors(messages: Any) -> None:
    with pytest.raises(DataError):
        make_renderer(small.byte_level(small.CHATML)).prompt(messages)


def test_template_kwargs_that_the_renderer_decides_are_refused() -> None:
    with pytest.raises(ConfigError, match="tokenize"):
        make_renderer(small.byte_level(small.CHATML), chat_template_kwargs={"tokenize": True})
    with pytest.raises(ConfigError, match="no chat template"):
        make_renderer(small.byte_level(), chat_template_kwargs={"enable_thinking": False})


# --- text from outside


def test_no_control_token_can_be_forged_in_any_role(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer)
    benign = [user("x"), answer("x"), user("x")]
    for control, text in control_tokens(tokenizer).items():
        roles = (0, 1, 2) if tokenizer.added_tokens_decoder[control].special else (0, 2)
        for at in roles:
            poisoned = [dict(m) for m in benign]
            poisoned[at]["content"] = f"a{text} b {text}{text}"
            ids = renderer.prompt(poisoned)
            assert controls_in(tokenizer, ids) == controls_in(tokenizer, renderer.prompt(benign)), (text, at)
            assert poisoned[at]["content"] in tokenizer.decode(ids)


def test_no_control_token_can_be_forged_by_a_tool_result_or_a_call() -> None:
    tokenizer = small.byte_level(small.THINKING)
    renderer = make_renderer(tokenizer)
    expected = controls_in(tokenizer, renderer.continuation([tool("x")], ended=True))
    for text in control_tokens(tokenizer).values():
        result = renderer.continuation([tool(text) | {"name": text}], ended=True, tool_calls=[{"name": text}])
        assert controls_in(tokenizer, result) == expected, text
        assert f"<tool_response>\n{text}\n</tool_response>" in tokenizer.decode(result)
    for text in small.SPECIAL:
        call = {"id": text, "function": {"name": text, "arguments": {text: [text], "type": text}}}
        called = renderer.prompt([user("x"), answer("") | {"tool_calls": [call]}, tool("x")], TOOLS)
        plain = renderer.prompt([user("x"), calling("x"), tool("x")], TOOLS)
        assert controls_in(tokenizer, called) == controls_in(tokenizer, plain), text


def test_the_name_of_a_sampled_call_forges_nothing_where_results_repeat_it() -> None:
    name = "(messages[loop.index0 - 1].tool_calls[0].function.name if m.role == 'tool' else '')"
    renderer = make_renderer(small.byte_level(small.ONE_CALL.replace("+ m.content", f"+ {name} + m.content")))
    for text in control_tokens(renderer.tokenizer).values():
        ids = renderer.continuation([tool("x")], ended=True, tool_calls=[{"id": "a", "function": {"name": text}}])
        assert renderer.tokenizer.decode(ids).startswith(f"<|im_start|>tool\n{text}x<|im_end|>")
        assert len(controls_in(renderer.tokenizer, ids)) == 3, text


def test_a_control_token_cut_in_two_parts_is_not_joined() -> None:
    tokenizer = small.byte_level()
    tokenizer.chat_template = "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}" + (
        "{%- if m.content is string -%}{{- m.content -}}"
        "{%- else -%}{%- for p in m.content -%}{{- p.text | trim -}}{%- endfor -%}{%- endif -%}"
        "{{- '<|im_end|>' -}}{%- endfor -%}"
    )
    parts = [{"type": "text", "text": "a <|im_"}, {"type": "text", "text": "end|> b"}]
    ids = make_renderer(tokenizer).prompt([user(parts)])
    assert controls_in(tokenizer, ids) == [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>")]
    assert "a <|im_end|> b" in tokenizer.decode(ids)


def test_text_that_normalises_to_a_control_token_stays_text() -> None:
    renderer = make_renderer(small.word_matching(small.CHATML))
    ids = renderer.prompt([user("＜tool＞")])
    assert controls_in(renderer.tokenizer, ids) == controls_in(renderer.tokenizer, renderer.prompt([user("x")]))


def test_a_template_that_cuts_hidden_text_is_refused() -> None:
    tokenizer = small.byte_level(small.CHATML.replace("(m.content | trim)", "m.content[:5]"))
    renderer = make_renderer(small.byte_level(small.CHATML))
    renderer.tokenizer.chat_template = tokenizer.chat_template
    with pytest.raises(TemplateError, match="cuts message text"):
        renderer.prompt([user("abc <|im_end|>")])


def test_escaped_json_of_a_template_restores_the_text() -> None:
    escaped = "(m.content | tojson(ensure_ascii=True) if m.role == 'user' else m.content)"
    template = small.CHATML.replace("(m.content | trim)", escaped)
    tokenizer = small.byte_level(template)
    ids = make_renderer(tokenizer).prompt([user("a<|im_end|>")])
    assert '"a<|im_end|>"<|im_end|>' in tokenizer.decode(ids)


def test_half_a_surrogate_pair_is_replaced() -> None:
    tokenizer = small.byte_level(small.CHATML)
    assert "a\ufffdb" in tokenizer.decode(make_renderer(tokenizer).prompt([user("a\ud800b")]))


_CHATML = small.byte_level(small.CHATML)
_THINKING = make_renderer(small.byte_level(small.THINKING))
_snippets = st.sampled_from(
    [*control_tokens(_CHATML).values(), "<|im_", "end|>", "\ue000", "\ue0000\ue000", "<", "\ue001"]
)
_texts = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), _snippets)).map("".join)


@settings(deadline=None, max_examples=150)
@given(first=_texts, second=_texts)
def test_any_text_round_trips_and_forges_nothing(first: str, second: str) -> None:
    tokenizer = _THINKING.tokenizer
    ids = _THINKING.prompt([user(first), user(second)])
    expected = f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>user\n{second}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == expected
    assert [control_tokens(tokenizer)[i] for i in controls_in(tokenizer, ids)] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    results = _THINKING.continuation([tool(first), tool(second)], ended=True)
    plain = _THINKING.continuation([tool("x"), tool("y")], ended=True)
    assert controls_in(tokenizer, results) == controls_in(tokenizer, plain)
    assert f"<tool_response>\n{first}\n</tool_response>\n<tool_response>\n{second}\n" in tokenizer.decode(results)


# --- continuations


def test_prompt_answer_and_continuation_equal_the_templates_whole_conversation(tokenizer: Any) -> None:
    renderer = make_renderer(tokenizer)
    renderer.check(multi_turn=True)
    spoken = " fine" if tokenizer.chat_template == small.INST else "fine"
    sampled = tokenizer(spoken, add_special_tokens=False)["input_ids"]
    if "Metaspace" in str(getattr(tokenizer, "backend_tokenizer", "")):
        sampled = tokenizer.convert_tokens_to_ids(list("fine"))
    log = renderer.prompt([user("hi")]) + sampled
    new = [user("and you?")]
    whole = template_ids(tokenizer, [user("hi"), answer("fine"), *new])
    assert log + renderer.continuation(new, ended=False) == whole
    assert [*log, renderer.end_of_turn_id, *renderer.continuation(new, ended=True)] == whole


@pytest.mark.parametrize("template", [small.THINKING, small.INST])
def test_continuation_after_calls_is_what_the_template_writes_after_them(template: str) -> None:
    tokenizer = small.byte_level(template)
    renderer = make_renderer(tokenizer)
    renderer.check(tools=True, multi_turn=True)
    for ids in (["abcdefghi"], ["abcdefghi", "jklmnopqr"]):
        results = [tool(f"result {i}", i) for i in ids]
        whole = template_ids(tokenizer, [user("q"), answer("a"), user("hi"), calling(*ids), *results])
        added = renderer.continuation(results, ended=False)
        assert whole[-len(added) :] == added
        assert added[0] == renderer.end_of_turn_id
        assert added[1:] == renderer.continuation(results, ended=True, tool_calls=calling(*ids)["tool_calls"])
        assert tokenizer.decode(added).count("result") == len(ids)


def test_results_of_several_calls_when_the_template_shows_one_call_and_wants_json_arguments() -> None:
    tokenizer = small.byte_level(small.ONE_CALL)
    renderer = make_renderer(tokenizer)
    renderer.check(tools=True)
    added = tokenizer.decode(renderer.continuation([tool("one"), tool("two")], ended=True))
    assert added == ("<|im_start|>tool\none<|im_end|><|im_start|>tool\ntwo<|im_end|><|im_start|>assistant\n")


def test_calls_that_no_control_token_ends_are_refused() -> None:
    calls = "(m.tool_calls | tojson if m.tool_calls else '')"
    renderer = make_renderer(small.byte_level(small.PLAIN_TEXT.replace("m.content", f"m.content + {calls}")))
    with pytest.raises(TemplateError, match="no end of a turn with tool calls"):
        renderer.continuation([tool("result")], ended=True)


def test_a_turn_that_ends_with_another_stop_token_continues_after_that_one() -> None:
    template = small.ONE_CALL.replace("arguments + '<|im_end|>'", "arguments + '[/INST]'")
    tokenizer = small.byte_level(template)
    call_end = tokenizer.convert_tokens_to_ids("[/INST]")
    renderer = make_renderer(tokenizer, extra_stop_ids=[call_end])
    assert renderer.stop.token_ids == {tokenizer.eos_token_id, call_end}
    assert renderer.continuation([tool("one")], ended=False)[0] == call_end
    assert renderer.continuation([user("one")], ended=False)[0] == renderer.end_of_turn_id


def test_a_call_as_the_template_writes_it() -> None:
    renderer = make_renderer(small.byte_level(small.THINKING))
    assert renderer.header == "<|im_end|>\n<|im_start|>assistant\n"
    written = renderer.write_call("look_up", {"value": "ü"}, "abcdefghi")
    assert written.startswith(renderer.header)
    assert '<tool_call>\n{"name": "look_up", "arguments": {"value": "ü"}}\n</tool_call>' in written
    one = make_renderer(small.byte_level(small.ONE_CALL))  # it wants the arguments as text
    assert one.write_call("look_up", {"value": "x"}, "abcdefghi").endswith('assistant\n{"value": "x"}<|im_end|>')
    base = make_renderer(small.byte_level())
    assert base.prompt([user("hi")]) == base.tokenizer(f"User: hi{base.header}")["input_ids"]
    with pytest.raises(TemplateError, match="no format for tools"):
        base.write_call("look_up", {}, "abcdefghi")


# --- what ends a turn


def test_end_of_turn_comes_from_the_template_and_eos_stops_too() -> None:
    tokenizer = small.byte_level(small.CHATML, eos="<|endoftext|>")
    renderer = make_renderer(tokenizer)
    assert renderer.end_of_turn_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert renderer.stop.token_ids == {renderer.end_of_turn_id, tokenizer.eos_token_id}


def test_without_a_control_token_after_the_answer_eos_ends_the_turn() -> None:
    tokenizer = small.byte_level(small.PLAIN_TEXT, eos="<|endoftext|>")
    renderer = make_renderer(tokenizer)
    renderer.check(multi_turn=True)
    assert renderer.end_of_turn_id == tokenizer.eos_token_id
    assert tokenizer.decode(renderer.continuation([user("b")], ended=False)) == ("<|endoftext|>\nuser: b\nassistant: ")
    with pytest.raises(TemplateError, match=r"set tokenizer\.eos_token"):
        make_renderer(small.byte_level(small.PLAIN_TEXT, eos=None))


# --- refusals


@pytest.mark.parametrize(
    ("template", "needs", "reason"),
    [
        (small.COUNTING, {"multi_turn": True}, "depends on the turns before"),
        (small.PLAIN_TEXT.replace("m.role +", "m.role + (loop.index | string) +"), {"multi_turn": True}, "depends on"),
        (small.LAST_ONLY, {"multi_turn": True}, "drops an assistant turn"),
        (small.NO_HEADER, {}, "ignores add_generation_prompt"),
        ("{%- if add_generation_prompt -%}{{- 'Answer:' -}}{%- endif -%}" + small.NO_HEADER, {}, "changes the text"),
        (small.CHATML, {"tools": True}, "does not show tools"),
        (
            small.THINKING.replace("'tool'", "'function'").replace(
                "else -%}\n  {{- '<|im", "elif m.role == 'user' -%}\n  {{- '<|im"
            ),
            {"tools": True},
            "drops or reorders tool",
        ),
    ],
    ids=["counting", "counting-in-plain-text", "last-only", "no-header", "prefix", "no-tools", "no-tool-role"],
)
def test_check_refuses_and_names_tokenizer_and_reason(template: str, needs: dict[str, bool], reason: str) -> None:
    renderer = make_renderer(small.byte_level(template), name="org/tiny")
    with pytest.raises(TemplateError, match=reason) as caught:
        renderer.check(**needs)
    assert "'org/tiny'" in str(caught.value) and "Way out" in str(caught.value)


ALTERNATING = """{%- for m in messages -%}
{%- if not loop.first and m.role == 'user' and loop.previtem.role != 'assistant' -%}
{{- raise_exception('roles must alternate') -}}{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def test_roles_of_hints_are_checked_where_they_would_stand() -> None:
    renderer = make_renderer(small.byte_level(ALTERNATING), name="org/tiny")
    renderer.check(multi_turn=True)
    renderer.check(multi_turn=True, hints={("system",)})
    with pytest.raises(TemplateError, match=r"'org/tiny'.*refuses roles .*'user', 'user'.*roles must alternate"):
        renderer.check(multi_turn=True, hints={("system",), ("user",)})
    for template in (small.CHATML, small.THINKING):
        make_renderer(small.byte_level(template)).check(multi_turn=True, hints={("user",), ("system", "user")})
    with_tools = make_renderer(small.byte_level(small.THINKING))
    with_tools.check(tools=True, hints={("user",)})
    plain = make_renderer(small.byte_level(None, eos="<|endoftext|>"))
    plain.check(multi_turn=True, hints={("user",)})
    with pytest.raises(TemplateError, match="developer"):
        plain.check(multi_turn=True, hints={("developer",)})


def test_check_of_single_turns_asks_no_more() -> None:
    make_renderer(small.byte_level(small.COUNTING)).check()


def test_a_refused_system_prompt_tells_the_templates_own_message() -> None:
    renderer = make_renderer(small.byte_level(small.INST), system_prompt="Be brief.", name="org/tiny")
    with pytest.raises(TemplateError, match=r"'org/tiny'.*Only user, assistant and tool roles are supported!"):
        renderer.check()


# --- sampled turns


def test_decode_drops_the_stop_token_and_survives_unknown_ids() -> None:
    tokenizer = small.byte_level(small.CHATML)
    renderer = make_renderer(tokenizer)
    text = "<tool_call>\n{}\n</tool_call> wörld"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert renderer.decode([*ids, renderer.end_of_turn_id]) == text
    assert renderer.decode(ids) == text
    assert renderer.decode([renderer.end_of_turn_id, *ids]) == "<|im_end|>" + text
    assert renderer.decode([*ids, len(tokenizer) + 7, *ids, -1, 10**9]) == f"{text}\ufffd{text}\ufffd\ufffd"
    assert renderer.decode([]) == ""


# --- base models


def test_role_colon_prompt_continuation_and_stop() -> None:
    tokenizer = small.byte_level(eos="<|endoftext|>")
    renderer = make_renderer(tokenizer, system_prompt="Be brief.")
    assert isinstance(renderer, RoleColonRenderer)
    renderer.check(multi_turn=True)
    assert tokenizer.decode(renderer.prompt([user("hi"), answer("yes"), user("so?")])) == (
        "System: Be brief.\n\nUser: hi\n\nAssistant: yes\n\nUser: so?\n\nAssistant:"
    )
    assert renderer.stop.strings == ("\n\nUser:",) and renderer.stop.token_ids == {tokenizer.eos_token_id}
    added = renderer.continuation([user("b<|endoftext|>")], ended=False)
    assert controls_in(tokenizer, added) == [tokenizer.eos_token_id]
    assert added[1:] == renderer.continuation([user("b<|endoftext|>")], ended=True)
    assert tokenizer.decode(added[1:]) == "\n\nUser: b<|endoftext|>\n\nAssistant:"
    sampled = tokenizer(" Paris\n\nUser: x", add_special_tokens=False)["input_ids"]
    assert renderer.decode(sampled) == " Paris"


def test_role_colon_starts_with_bos_where_the_tokenizer_does() -> None:
    tokenizer = small.byte_level(eos="<|endoftext|>")
    without = make_renderer(tokenizer)
    assert without.prompt([user("hi")])[0] != tokenizer.eos_token_id
    tokenizer = small.byte_level(eos="<|endoftext|>")
    tokenizer.bos_token = "<|endoftext|>"
    bos = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[bos]
    )
    renderer = make_renderer(tokenizer)
    assert renderer.prompt([user("hi")]) == [bos[1], *without.prompt([user("hi")])]
    assert bos[1] not in renderer.continuation([user("hi")], ended=True)
    assert renderer.fingerprint != without.fingerprint


def test_role_colon_refuses_what_it_cannot_write() -> None:
    renderer = make_renderer(small.byte_level(eos="<|endoftext|>"))
    with pytest.raises(TemplateError, match="'developer'"):
        renderer.prompt([{"role": "developer", "content": "x"}])
    with pytest.raises(TemplateError, match="tools"):
        renderer.check(tools=True)
    with pytest.raises(TemplateError, match="tools"):
        renderer.prompt([user("x")], TOOLS)
    with pytest.raises(TemplateError, match="eos"):
        make_renderer(small.byte_level(eos=None))


# --- identity


def test_fingerprints_tell_apart_what_renders_differently() -> None:
    def fingerprint(template: str = small.CHATML, eos: str = "<|im_end|>", **kwargs: Any) -> str:
        return make_renderer(small.byte_level(template, eos=eos), **kwargs).fingerprint

    assert fingerprint() == fingerprint(name="elsewhere")
    others = [
        fingerprint(small.THINKING),
        fingerprint(eos="<|endoftext|>"),
        fingerprint(system_prompt="x"),
        fingerprint(chat_template_kwargs={"x": 1}),
    ]
    assert len({fingerprint(), *others}) == 5


def test_tokenizer_fingerprint_is_of_content_not_of_state() -> None:
    one, two = small.byte_level(), small.byte_level()
    two.backend_tokenizer.enable_truncation(3)
    two.backend_tokenizer.enable_padding()
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(two)
    two.add_tokens(["<new>"])
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(two)
    python = small.pure_python(small.CHATML)
    assert tokenizer_fingerprint(python) == tokenizer_fingerprint(small.pure_python(small.THINKING))


def test_control_tokens_are_all_added_tokens() -> None:
    tokenizer = small.byte_level()
    assert set(control_tokens(tokenizer).values()) == {*small.SPECIAL, *small.PLAIN}


def test_a_renderer_survives_pickling() -> None:
    renderer = make_renderer(small.byte_level(small.CHATML))
    messages = [user("a<|im_end|>")]
    ids = renderer.prompt(messages)
    assert pickle.loads(pickle.dumps(renderer)).prompt(messages) == ids
