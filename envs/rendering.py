"""Messages to tokens and back, for one tokenizer and its chat template.

The prompt is rendered once. After a sampled turn only what follows it is rendered: the template is
given a small dummy conversation that ends in the new messages, and the text after the dummy
answer's end of turn is what gets appended. The real history is never rendered again, so a template
that rewrites history (Qwen3 drops earlier thinking) cannot change a token that was sampled.
`check` proves at start-up that the appended text does not depend on the history.

Text from messages never becomes a control token; see `envs/text_encoding.py`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from envs.dummy_conversations import (
    CHECK_TOOL,
    assistant,
    check_cases,
    dummy_calls,
    tool_call,
    user,
    with_json_arguments,
)
from envs.text_encoding import Literals, TextEncoder, control_tokens, tokenizer_fingerprint
from envs.types import Message, StopCondition
from errors import ConfigError, DataError, TemplateError

__all__ = [
    "ChatTemplateRenderer",
    "Renderer",
    "RoleColonRenderer",
    "control_tokens",
    "make_renderer",
    "tokenizer_fingerprint",
]

_OURS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "return_dict",
    "tokenize",
    "tools",
}


def make_renderer(
    tokenizer: Any,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    name: str = "",
    extra_stop_ids: Iterable[int] = (),
) -> Renderer:
    """The tokenizer's chat template if it has one, else `System: … User: … Assistant:`.

    `system_prompt` opens every conversation that has no system message of its own.
    `extra_stop_ids` also end a turn, as do those of a model's `generation_config.eos_token_id`.
    """
    kwargs = dict(chat_template_kwargs or {})
    if not tokenizer.chat_template:
        if kwargs:
            raise ConfigError(
                f"chat_template_kwargs {sorted(kwargs)} given, but tokenizer {tokenizer.name_or_path!r} has "
                "no chat template. Drop them, or give the tokenizer a chat_template."
            )
        return RoleColonRenderer(tokenizer, system_prompt=system_prompt, name=name, extra_stop_ids=extra_stop_ids)
    if _OURS & kwargs.keys():
        raise ConfigError(
            f"chat_template_kwargs sets {sorted(_OURS & kwargs.keys())}, which the renderer decides itself; "
            "expected only variables of the template, as enable_thinking."
        )
    return ChatTemplateRenderer(
        tokenizer,
        chat_template_kwargs=kwargs,
        system_prompt=system_prompt,
        name=name,
        extra_stop_ids=extra_stop_ids,
    )


class Renderer(ABC):
    """Messages to tokens and back. `name` is the tokenizer's, for error texts."""

    stop_strings: tuple[str, ...] = ()
    end_of_turn_id: int  # ends an assistant turn in this format

    def __init__(self, tokenizer: Any, *, system_prompt: str | None, name: str, extra_stop_ids: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.name = name or tokenizer.name_or_path or type(tokenizer).__name__
        self.system_prompt = system_prompt
        self._encoder = TextEncoder(tokenizer)
        self._known_ids = frozenset(tokenizer.get_vocab().values()) | self._encoder.controls.keys()
        self.end_of_turn_id = self._find_end_of_turn()
        ids = {self.end_of_turn_id, *extra_stop_ids}
        if tokenizer.eos_token_id is not None:
            ids.add(tokenizer.eos_token_id)
        self.stop = StopCondition(frozenset(ids), self.stop_strings)

    @cached_property
    def fingerprint(self) -> str:
        """sha256: renderers with equal fingerprints render identically."""
        parts = {
            "class": type(self).__name__,
            "format": self._format(),
            "system_prompt": self.system_prompt,
            "special_tokens": self.tokenizer.special_tokens_map,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()

    @abstractmethod
    def prompt(self, messages: Sequence[Message], tools: Sequence[dict] | None = None) -> list[int]:
        """Ids of a whole prompt, up to where the assistant starts to write."""

    @abstractmethod
    def continuation(
        self, new_messages: Sequence[Message], *, ended: bool, tool_calls: Sequence[dict] = ()
    ) -> list[int]:
        """Ids to append after a sampled turn: the end of turn unless it `ended` with one, the new
        messages, the next assistant header. `tool_calls` are those that the turn made."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of text as an assistant would write it; none of them is a control token."""
        literals = Literals(text)
        return self._encoder.encode_after(self.end_of_turn_id, literals.hide(text), literals)

    @abstractmethod
    def check(self, *, tools: bool = False, multi_turn: bool = False, hints: Iterable[tuple[str, ...]] = ()) -> None:
        """Proves that this format can be appended to; raises TemplateError with the reason if not. `hints` are roles of
        messages that come after those of an environment: a teacher's hints."""

    @property
    @abstractmethod
    def header(self) -> str:
        """The text between a user's message and what the assistant writes."""

    @abstractmethod
    def write_call(self, name: str, arguments: Mapping[str, Any], call_id: str) -> str:
        """The text of an assistant turn, from the header on, that makes this one call. Raises TemplateError
        if the format has no tools."""

    @abstractmethod
    def _find_end_of_turn(self) -> int: ...

    @abstractmethod
    def _format(self) -> Any:
        """What decides the text of a rendered conversation, for the fingerprint."""

    def decode(self, sampled_ids: Sequence[int]) -> str:
        """Text of a sampled turn, without the stop token or stop string that ended it. Control tokens
        stay visible; an id that the tokenizer does not know (a padded embedding) reads U+FFFD."""
        ids = list(sampled_ids)
        if ids and ids[-1] in self.stop.token_ids:
            ids.pop()
        text, known = "", []
        for i in ids:
            if i in self._known_ids:
                known.append(i)
                continue
            text, known = text + self._decode_known(known) + "\ufffd", []
        text += self._decode_known(known)
        cuts = [text.index(string) for string in self.stop.strings if string in text]
        return text[: min(cuts)] if cuts else text

    def _decode_known(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _validated(self, messages: Sequence[Message]) -> list[Message]:
        for message in messages:
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str) or self._encoder.forges_control(role):
                raise DataError(f"a message needs a role such as 'user', got {str(message)[:200]!r}")
            if message.get("content") is None and not message.get("tool_calls"):
                raise DataError(f"a {role} message needs content or tool_calls, got {str(message)[:200]!r}")
        return list(messages)

    def _conversation(self, messages: Sequence[Message]) -> list[Message]:
        if not messages:
            raise DataError("a prompt needs at least one message, got none")
        conversation = self._validated(messages)
        if self.system_prompt is not None and all(m["role"] != "system" for m in conversation):
            conversation.insert(0, {"role": "system", "content": self.system_prompt})
        return conversation

    def _error(self, reason: str, way_out: str) -> TemplateError:
        return TemplateError(f"tokenizer {self.name!r}: {reason}. Way out: {way_out}")


class ChatTemplateRenderer(Renderer):
    """Renders with the tokenizer's own chat template."""

    def __init__(self, tokenizer: Any, *, chat_template_kwargs: Mapping[str, Any], **common: Any) -> None:
        self._kwargs = dict(chat_template_kwargs)
        super().__init__(tokenizer, **common)

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict] | None = None) -> list[int]:
        conversation = self._conversation(messages)
        literals = Literals(conversation, tools or (), self.tokenizer.chat_template)
        hidden = self._encoder.hide_messages(conversation, literals)
        hidden_tools = self._encoder.hide_all(tools or (), literals)
        return self._encoder.encode(self._render(hidden, tools=hidden_tools), literals)

    def continuation(
        self, new_messages: Sequence[Message], *, ended: bool, tool_calls: Sequence[dict] = ()
    ) -> list[int]:
        end, text, literals = self._suffix(self._validated(new_messages), tool_calls)
        ids = self._encoder.encode_after(end, text, literals)
        return ids if ended else [end, *ids]

    def check(self, *, tools: bool = False, multi_turn: bool = False, hints: Iterable[tuple[str, ...]] = ()) -> None:
        self._check_generation_prompt()
        if tools:
            self._check_tools_shown()
        endings = [[{"role": role, "content": f"hint {i}"} for i, role in enumerate(roles)] for roles in {(), *hints}]
        for history, new in check_cases(tools=tools, multi_turn=multi_turn):
            for hint in sorted(endings, key=len):
                self._check_case(history, [*new, *hint])

    @cached_property
    def header(self) -> str:
        return self._render(self._conversation([user("question")])).rpartition("question")[2]

    def write_call(self, name: str, arguments: Mapping[str, Any], call_id: str) -> str:
        call = tool_call(name, dict(arguments), call_id)
        asked = [*self._conversation([user("question")]), assistant("", [call])]
        if self._refuses(asked):
            asked = with_json_arguments(asked)
        return self._render(asked, header=False).rpartition("question")[2]

    def _format(self) -> Any:
        return {"template": self.tokenizer.chat_template, "kwargs": self._kwargs}

    def _render(self, messages: list[Message], *, header: bool = True, tools: Sequence[dict] = ()) -> str:
        with_tools = bool(tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
        # a tokenizer may have a second template for tool use, taken when tools is not None
        template = self.tokenizer.get_chat_template(tools=[] if with_tools else None)
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                chat_template=template,
                add_generation_prompt=header,
                tokenize=False,
                **self._kwargs,
            )
        except Exception as error:  # a template is a program: it raises whatever it likes
            roles = [message["role"] for message in messages]
            raise self._error(
                f"its chat template refuses roles {roles} ({type(error).__name__}: {error})",
                "leave out the roles that it does not know (no system_prompt, no tools), set "
                "chat_template_kwargs, or give the tokenizer another chat_template",
            ) from error

    def _find_end_of_turn(self) -> int:
        """The first control token after an assistant's content; the eos token if there is none."""
        literals = Literals(self.tokenizer.chat_template)
        answer = literals.hide("answer")
        text = self._render([user("question"), assistant(answer)], header=False)
        if answer not in text:
            raise self._error("its chat template drops the assistant's answer", "use another chat_template")
        tail = text.rpartition(answer)[2]
        found = next(self._encoder.find_controls(tail), None)
        self._template_ends_turns = found is not None
        if found is not None:
            return found[2]
        return _eos_or_error(self)

    def _suffix(self, new_messages: list[Message], tool_calls: Sequence[dict]) -> tuple[int, str, Literals]:
        """The id that ends a turn before these messages, and the text that follows it."""
        literals = Literals(new_messages, list(tool_calls), self.tokenizer.chat_template)
        new = self._encoder.hide_messages(new_messages, literals)
        answer, argument = literals.hide("answer"), literals.hide("argument")
        calls = self._encoder.hide_all(tool_calls, literals)
        text = self._render_after_dummy(new, calls, answer, argument)
        # the call is written after the content, or instead of it
        anchor = next((mark for mark in (argument, answer) if mark in text), None)
        if anchor is None:
            raise self._error(
                f"its chat template drops an assistant turn before {[m['role'] for m in new]}, "
                "so what follows it cannot be found",
                "train single turns, or use another chat_template",
            )
        tail = text.rpartition(anchor)[2]
        if not self._template_ends_turns:
            if anchor == argument:
                raise self._error(
                    "its chat template marks no end of a turn with tool calls, so what follows it cannot be found",
                    "train without tools, or use a chat_template that ends turns with a control token",
                )
            return self.end_of_turn_id, tail, literals
        for _, end, control in self._encoder.find_controls(tail):
            if control in self.stop.token_ids:
                return control, tail[end:], literals
        raise self._error(
            f"its chat template ends the last turn with {self._encoder.controls[self.end_of_turn_id]!r} but "
            "earlier turns without any stop token",
            "train single turns, pass the token that ends earlier turns in extra_stop_ids, or use another "
            "chat_template",
        )

    def _render_after_dummy(self, new: list[Message], tool_calls: Sequence[dict], answer: str, argument: str) -> str:
        refusal: TemplateError | None = None
        for calls in dummy_calls(new, tool_calls, argument):
            try:
                return self._render([user("question"), assistant(answer, calls), *new])
            except TemplateError as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _check_generation_prompt(self) -> None:
        question = self._conversation([user("question")])
        with_header, without = self._render(question), self._render(question, header=False)
        eos = self.tokenizer.eos_token or ""  # Phi-3 ends a finished conversation with it
        if not with_header.startswith((without, without.removesuffix(eos))):
            raise self._error(
                f"add_generation_prompt changes the text before it: {without!r} became {with_header!r}",
                "use a chat_template that only appends the assistant's header",
            )
        answered = self._render([*question, assistant("answer")], header=False)
        missing = answered.partition("answer")[0].removeprefix(with_header)
        if with_header == without and self._encoder.has_controls(missing):
            raise self._error(
                f"its chat template ignores add_generation_prompt: it never writes {missing!r}",
                "use a chat_template that appends the assistant's header",
            )

    def _check_tools_shown(self) -> None:
        if CHECK_TOOL["function"]["name"] not in self._render(
            self._conversation([user("question")]), tools=[CHECK_TOOL]
        ):
            raise self._error(
                "its chat template does not show tools, so the model would not know them",
                "use a chat_template with tools, or a tokenizer that was trained with one",
            )

    def _check_case(self, history: list[Message], new: list[Message]) -> None:
        """What we append after this history is what the template itself writes there."""
        calls = history[-1].get("tool_calls", ())
        end, text, literals = self._suffix(new, calls)
        position = 0
        for message in new:
            position = text.find(message["content"], position)
            if position < 0:
                raise self._error(
                    f"its chat template drops or reorders {message['role']} messages",
                    "leave out that role, or use another chat_template",
                )
        if calls and self._refuses(history):
            history = with_json_arguments(history)
        if len(calls) > 1 and self._refuses(history):
            return  # one call at a time only: then results of several come from the dummy with one
        whole = self._render([*history, *new])
        appended = self.continuation(new, ended=False, tool_calls=calls)
        # where the template writes no end of turn, ids may merge over the seam: compare text
        same = whole.endswith(text)
        if same and self._template_ends_turns:
            same = self._encoder.encode(whole, literals)[-len(appended) :] == appended
        start = self._render(history[:-1]) + str(history[-1]["content"])
        end_text = self._encoder.controls[end] if self._template_ends_turns else ""
        if same and not calls and whole.startswith(start):
            between = whole.removeprefix(start).removesuffix(text)
            same = between.strip() == end_text
        if not same:
            raise self._error(
                "what its chat template writes after a turn depends on the turns before it: expected the "
                f"conversation to end in {end_text + text!r}, got {whole[-len(text) - 80 :]!r}",
                "train single turns, or use a chat_template that only appends",
            )

    def _refuses(self, messages: list[Message]) -> bool:
        try:
            self._render(messages)
        except TemplateError:
            return True
        return False


class RoleColonRenderer(Renderer):
    """`User: …` and `Assistant:` in plain text, for a base model without a chat template.

    Turns are plain text here, so a message can imitate one; it cannot forge a control token.
    A turn that ended with the stop string keeps it, and the next user turn repeats `User:`.
    """

    stop_strings = ("\n\nUser:",)

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict] | None = None) -> list[int]:
        if tools:
            raise self._no_tools()
        conversation = self._conversation(messages)
        literals = Literals(conversation)
        text = "\n\n".join([*self._turns(conversation, literals), "Assistant:"])
        return self._bos + self._encoder.encode(text, literals)

    def continuation(
        self, new_messages: Sequence[Message], *, ended: bool, tool_calls: Sequence[dict] = ()
    ) -> list[int]:
        new = self._validated(new_messages)
        literals = Literals(new)
        text = "\n\n".join(["", *self._turns(new, literals), "Assistant:"])
        ids = self._encoder.encode_after(self.end_of_turn_id, text, literals)
        return ids if ended else [self.end_of_turn_id, *ids]

    def check(self, *, tools: bool = False, multi_turn: bool = False, hints: Iterable[tuple[str, ...]] = ()) -> None:
        if tools:
            raise self._no_tools()
        for _ in self._turns([{"role": role, "content": ""} for roles in hints for role in roles], Literals()):
            pass  # raises for a role that has no plain-text form

    @property
    def header(self) -> str:
        return "\n\nAssistant:"

    def write_call(self, name: str, arguments: Mapping[str, Any], call_id: str) -> str:
        raise self._no_tools()

    @cached_property
    def _bos(self) -> list[int]:
        """The bos token if the tokenizer starts a text with it by itself."""
        first = self.tokenizer("a")["input_ids"][:1]
        return first if first and first[0] == self.tokenizer.bos_token_id else []

    def _turns(self, messages: list[Message], literals: Literals) -> Iterator[str]:
        for message in self._encoder.hide_messages(messages, literals):
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant", "tool"):
                raise self._error(
                    f"it has no chat template and role {role!r} has no plain-text form",
                    "use the roles system, user, assistant and tool, or give the tokenizer a chat_template",
                )
            if not isinstance(content, str):
                raise DataError(f"a {role} message for plain text needs a string, got {str(content)[:200]!r}")
            yield f"{role.capitalize()}: {content}"

    def _find_end_of_turn(self) -> int:
        return _eos_or_error(self)

    def _format(self) -> Any:
        return {"bos": self._bos}

    def _no_tools(self) -> TemplateError:
        return self._error(
            "it has no chat template, so there is no format for tools",
            "give the tokenizer a chat_template with tools, or train without tools",
        )


def _eos_or_error(renderer: Renderer) -> int:
    if renderer.tokenizer.eos_token_id is None:
        raise renderer._error(
            "nothing ends an assistant turn: no control token after it and no eos_token",
            "set tokenizer.eos_token to the token that ends a turn",
        )
    return renderer.tokenizer.eos_token_id
