"""Chat templates as the common open models have them, cut down, and a student that says what it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import anyio
import small_tokenizers as small
from tokenizers import AddedToken

from envs.rendering import Renderer, make_renderer
from envs.types import Message, Sampled, SamplingParams, TeacherHint
from models.types import WeightSource

HERMES = small.THINKING

_IM = """{%- if tools -%}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
  {{- '<|im_start|>assistant\n' + (m.content or '') -}}
  {%- for c in m.tool_calls or [] -%}CALL{%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- elif m.role == 'tool' -%}
  {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
  {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
  {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

QWEN_XML = _IM.replace(
    "CALL",
    """{{- '<tool_call>\n<function=' + c.function.name + '>\n' -}}
  {%- for k, v in c.function.arguments | items -%}
    {{- '<parameter=' + k + '>\n' -}}
    {{- v | tojson if v is mapping or (v is sequence and v is not string) else v | string -}}
    {{- '\n</parameter>\n' -}}
  {%- endfor -%}
  {{- '</function>\n</tool_call>' -}}""",
)
PREFILLED_THINKING = HERMES[: HERMES.rindex("assistant\n")] + "assistant\n<think>\n' -}}{%- endif -%}"

# as Llama 3.1: one call a turn, in place of content, ended with another token than an answer
LLAMA3 = """{%- for m in messages -%}
{%- if m.role == 'assistant' and m.tool_calls -%}
  {%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call only') -}}{%- endif -%}
  {{- '<|start|>assistant<|h|>\n\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' -}}
  {{- (m.tool_calls[0].function.arguments | tojson) + '}<|eom_id|>' -}}
{%- elif m.role == 'tool' -%}{{- '<|start|>ipython<|h|>\n\n' + (m.content | tojson) + '<|eot_id|>' -}}
{%- else -%}
  {{- '<|start|>' + m.role + '<|h|>\n\n' -}}
  {%- if tools and m.role == 'user' and loop.first -%}{{- 'Tools: ' + (tools | tojson) + '\n' -}}{%- endif -%}
  {{- m.content + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant<|h|>\n\n' -}}{%- endif -%}"""

_MISTRAL = """{%- for m in messages -%}
{%- if m.role == 'user' -%}
  {%- if tools and loop.last -%}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
  {{- '[INST] ' + m.content + '[/INST]' -}}
{%- elif m.role == 'assistant' and m.tool_calls -%}
  {%- for c in m.tool_calls -%}
    {%- if c.id is not defined or c.id | length != 9 -%}{{- raise_exception('ids have length 9') -}}{%- endif -%}
  {%- endfor -%}CALLS{{- eos_token -}}
{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}
{%- else -%}{{- '[TOOL_RESULTS] ' + (m.content | tojson) + ' ' + m.tool_call_id + '[/TOOL_RESULTS]' -}}
{%- endif -%}
{%- endfor -%}"""
MISTRAL_LIST = _MISTRAL.replace(
    "CALLS",
    """{{- '[TOOL_CALLS] [' -}}
  {%- for c in m.tool_calls -%}
    {{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' + ('' if loop.last else ', ') -}}
  {%- endfor -%}{{- ']' -}}""",
)
MISTRAL_NAMED = _MISTRAL.replace(
    "CALLS",
    """{%- for c in m.tool_calls -%}
    {{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) -}}
  {%- endfor -%}""",
)

CONTROLS = (
    "<|start|>", "<|h|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip

TEMPLATES = {
    "hermes": HERMES,
    "qwen_xml": QWEN_XML,
    "llama3_json": LLAMA3,
    "mistral_list": MISTRAL_LIST,
    "mistral_named": MISTRAL_NAMED,
}
EOS = {"llama3_json": "<|eot_id|>", "mistral_list": "<|endoftext|>", "mistral_named": "<|endoftext|>"}


def tokenizer_of(template: str, eos: str = "<|im_end|>") -> Any:
    tokenizer = small.byte_level(eos=eos)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROLS], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@cache
def renderer_of(name: str) -> Renderer:
    """A renderer for one of `TEMPLATES`. All have one vocabulary."""
    tokenizer = tokenizer_of(TEMPLATES[name], EOS.get(name, "<|im_end|>"))
    eom = [tokenizer.convert_tokens_to_ids("<|eom_id|>")] if name == "llama3_json" else []
    return make_renderer(tokenizer, name=name, extra_stop_ids=eom)


class ScriptedStudent:
    """Says these texts, one a turn, each ended by its end of turn; `CUT` at the end of one leaves that out.
    Records what it was sent and what it said."""

    CUT = "\0"

    def __init__(self, renderer: Renderer, *texts: str) -> None:
        self.renderer = renderer
        self.texts = list(texts)
        self.sent: list[list[int]] = []
        self.said: list[list[int]] = []

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        await anyio.lowlevel.checkpoint()
        text = self.texts.pop(0)
        ids = self.renderer.tokenizer(text.removesuffix(self.CUT), add_special_tokens=False)["input_ids"]
        if not text.endswith(self.CUT):
            ids = [*ids, self.renderer.end_of_turn_id]
        ids = ids[: params.max_tokens]
        self.sent.append(list(prompt_ids))
        self.said.append(ids)
        return Sampled(ids, [-0.5] * len(ids), ids[-1] in params.stop.token_ids)

    async def __aenter__(self) -> ScriptedStudent:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def update_weights(self, source: WeightSource, version: int) -> None:
        pass

    async def sleep(self) -> None:
        pass


class Row:
    """The part of a group builder that an episode keeps."""

    dataset, row_id, teacher = "d", "r", "t"
    group_size = 1

    def __init__(
        self, teacher_messages: tuple[Message, ...] | None = None, teacher_hints: tuple[TeacherHint, ...] = ()
    ) -> None:
        self.teacher_messages, self.teacher_hints = teacher_messages, teacher_hints


def user(content: str) -> Message:
    return {"role": "user", "content": content}
