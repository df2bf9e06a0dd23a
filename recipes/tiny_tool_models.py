"""Two tiny untrained models that can be shown tools, so that a tool environment can be tried anywhere.

They read and write characters, in Qwen's chat format, and know nothing: what they write is noise. They show
that a run works, its masks, its counts and its falling KL, and not that a model learns to use a tool.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SPECIAL = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
_PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_TEMPLATE = """{%- if tools -%}
{{- '<|im_start|>system\nTools:' -}}
{%- for t in tools -%}{{- '\n' + (t | tojson) -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
  {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
  {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
  {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- else -%}
  {{- '<|im_start|>' + m.role + '\n' + (m.content or '') -}}
  {%- for c in m.tool_calls or [] -%}{{- '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' -}}{%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def make_models(folder: str | Path, *, context: int = 2048) -> tuple[str, str]:
    """Write a student and a teacher, unlike each other, below `folder`; returns their folders."""
    tokenizer = _tokenizer()
    paths = []
    for name, seed in (("student", 1), ("teacher", 2)):
        path = Path(folder, name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config: dict[str, Any] = dict(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=context,
                initializer_range=0.1,  # at the usual 0.02 the two would hardly differ
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
            )
            model = LlamaForCausalLM(LlamaConfig(**config))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths.append(str(path))
    return paths[0], paths[1]


def _tokenizer() -> PreTrainedTokenizerFast:
    characters = ["\n", *map(chr, range(32, 127))]
    backend = Tokenizer(WordLevel({t: i for i, t in enumerate([*_SPECIAL, *characters])}, unk_token="<|unk|>"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    backend.decoder = Fuse()  # type: ignore[assignment]
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in _PLAIN])
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
