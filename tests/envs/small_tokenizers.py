"""Tokenizers and chat templates small enough to be made inside a test."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

_TEXT = [
    "The student acts, the teacher scores every token the student chose.",
    "question and answer, user and assistant, system and tool, look up a word",
    "im_start im_end think tool_call endoftext <div> [list] </div> 2 + 2 = 4\n\n",
]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<｜end▁of▁line｜>")
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

CHATML = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' + (m.content | trim) + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# as Qwen3: tool results are user turns, thinking is kept only after the last real user message
THINKING = """{%- if tools -%}
{{- '<|im_start|>system\nTools:' -}}
{%- for t in tools -%}{{- '\n' + (t | tojson) -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
  {%- set thought = '' -%}{%- set said = m.content or '' -%}
  {%- if '</think>' in said -%}
    {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() -%}
    {%- set said = said.split('</think>')[-1].lstrip('\n') -%}
  {%- endif -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if loop.index0 > ns.last -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}
  {{- said -}}
  {%- for c in m.tool_calls or [] -%}
    {{- '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' -}}
  {%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- elif m.role == 'tool' -%}
  {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
  {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
  {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- else -%}
  {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# as Mistral: no header for the assistant, calls replace content, ids of nine characters
INST = """{%- for m in messages -%}
{%- if m.role == 'user' -%}
  {%- if tools and loop.last -%}{{- '[TOOLS]' + (tools | tojson) -}}{%- endif -%}
  {{- '[INST] ' + m.content + ' [/INST]' -}}
{%- elif m.role == 'assistant' and m.tool_calls -%}
  {{- ' CALLS ' -}}
  {%- for c in m.tool_calls -%}
    {%- if c.id | length != 9 -%}{{- raise_exception('ids must have length 9') -}}{%- endif -%}
    {{- (c.function | tojson) + ' ' + c.id -}}
  {%- endfor -%}
  {{- eos_token -}}
{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}
{%- elif m.role == 'tool' -%}{{- 'RESULT ' + m.tool_call_id + ' ' + (m.content | tojson) -}}
{%- else -%}{{- raise_exception('Only user, assistant and tool roles are supported!') -}}
{%- endif -%}
{%- endfor -%}"""

# as Llama 3.1: one call a turn, written instead of the content
ONE_CALL = """{%- if tools -%}{{- tools | tojson -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.tool_calls -%}
  {%- if m.tool_calls | length != 1 -%}{{- raise_exception('only single tool-calls at once!') -}}{%- endif -%}
  {{- '<|im_start|>assistant\n' + m.tool_calls[0].function.arguments + '<|im_end|>' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

COUNTING = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + ' ' + (messages | length | string) + '\n' + m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

LAST_ONLY = """{{- '<|im_start|>' + messages[-1].role + '\n' + messages[-1].content + '<|im_end|>\n' -}}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

NO_HEADER = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endfor -%}"""

PLAIN_TEXT = """{%- for m in messages -%}{{- m.role + ': ' + m.content + '\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"""


@cache
def _bpe() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(_TEXT, trainer)
    return backend.to_str()


def byte_level(template: str | None = None, *, eos: str | None = "<|im_end|>") -> Any:
    """Byte-level BPE: any text survives a round trip."""
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bpe()), eos_token=eos)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    tokenizer.chat_template = template
    return tokenizer


def unigram(template: str) -> Any:
    """SentencePiece-like: control tokens are pieces of the model too, and the likeliest ones."""
    pieces = [("<unk>", 0.0), ("<|im_start|>", 0.0), ("<|im_end|>", 0.0), ("▁", -3.0)]
    pieces += [(chr(code), -4.0) for code in range(33, 127)] + [("\n", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def word_matching(template: str) -> Any:
    """BPE that takes a whole word from its vocabulary (`ignore_merges`, as Llama 3), split at spaces only,
    over text normalised with NFKC."""
    letters = [chr(code) for code in range(33, 127)] + ["\n", "▁", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [], ignore_merges=True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never", split=False)]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=True)])
    tokenizer.chat_template = template
    return tokenizer


def pure_python(template: str) -> Any:
    """A tokenizer with no Rust backend."""
    tokenizer: Any = ByT5Tokenizer(extra_ids=3)
    tokenizer.chat_template = template.replace("<|im_start|>", "<extra_id_0>").replace("<|im_end|>", "</s>")
    return tokenizer
