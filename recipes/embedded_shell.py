"""The tool demo's models: a teacher that knows the solutions of the tasks that ship by heart, and a student that
has only begun to learn them. Neither can use a shell: put before another task, both write nonsense.

Made here by plain supervised learning on eight short transcripts, as `recipes/embedded.py` makes those of the
arithmetic. Name them in any recipe as `embedded:shell-teacher` and `embedded:shell-student`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from envs.harbor.dataset import STARTER, load_harbor_dataset
from envs.harbor.env import SYSTEM_PROMPT, TOOL_SCHEMA
from envs.rendering import Renderer, make_renderer
from envs.types import Message
from models.cpu_matmul import use_fast_exact_matmul
from recipes.embedded import ShellRecipe

CONTEXT = 2048
ANSWER = "Done."
_SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
_PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_VOCABULARY = 1500
_TEMPLATE = """{%- for m in messages -%}
{%- if loop.first and tools -%}
{{- '<|im_start|>system\n' + (m.content + '\n\n' if m.role == 'system' else '') + 'Tools:' -}}
{%- for t in tools -%}{{- '\n' + (t | tojson) -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- if m.role == 'tool' -%}
  {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
  {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
  {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- elif not (tools and loop.first and m.role == 'system') -%}
  {{- '<|im_start|>' + m.role + '\n' + (m.content or '') -}}
  {%- for c in m.tool_calls or [] -%}{{- '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' -}}{%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


@dataclass(frozen=True)
class Transcript:
    """Instructions of one task, step by step, and the command that solves each."""

    instructions: tuple[str, ...]
    commands: tuple[str, ...]


def transcripts() -> Iterator[Transcript]:
    for task in load_harbor_dataset(STARTER).tasks.values():
        solutions = [step.solution / "solve.sh" for step in task.steps if step.solution is not None]
        commands = [path.read_text().removeprefix("#!/bin/bash\nset -e\n").strip() for path in solutions]
        yield Transcript(tuple(step.instruction for step in task.steps), tuple(commands))


def call(command: str) -> str:
    """A call of `bash`, as the models of this template write it."""
    return f"<tool_call>\n{json.dumps({'name': 'bash', 'arguments': {'command': command}})}\n</tool_call>"


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of these texts: any other text is longer, and nothing is lost."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        show_progress=False,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in _PLAIN])
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def encode(renderer: Renderer, transcript: Transcript) -> tuple[list[int], list[int]]:
    """Ids of a whole episode as a run would log it, and labels: -100 but where the student speaks."""
    ids: list[int] = []
    labels: list[int] = []

    def hears(new: list[int]) -> None:
        ids.extend(new)
        labels.extend([-100] * len(new))

    def says(text: str) -> None:
        new = [*renderer.tokenizer(text, add_special_tokens=False)["input_ids"], renderer.end_of_turn_id]
        ids.extend(new)
        labels.extend(new)

    for i, (instruction, command) in enumerate(zip(transcript.instructions, transcript.commands, strict=True)):
        message: Message = {"role": "user", "content": instruction}
        hears(renderer.continuation([message], ended=True) if i else renderer.prompt([message], [TOOL_SCHEMA]))
        says(call(command))
        made = {"id": "call00000", "type": "function", "function": {"name": "bash", "arguments": {"command": command}}}
        result: Message = {"role": "tool", "tool_call_id": "call00000", "name": "bash", "content": "[exit code 0]"}
        hears(renderer.continuation([result], ended=True, tool_calls=[made]))
        says(ANSWER)
    return ids, labels


def make(recipe: ShellRecipe, folder: Path) -> None:
    """Train one model on `batch` of the transcripts at every step, and save it with its tokenizer."""
    use_fast_exact_matmul()
    known = list(transcripts())
    texts = [SYSTEM_PROMPT, json.dumps(TOOL_SCHEMA), *(text for t in known for text in t.instructions)]
    tokenizer = make_tokenizer([*texts, *(call(command) for t in known for command in t.commands)])
    renderer = make_renderer(tokenizer, system_prompt=SYSTEM_PROMPT, name="embedded:shell")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=recipe.hidden,
                intermediate_size=4 * recipe.hidden,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                num_key_value_heads=recipe.heads,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
                pad_token_id=0,
            )
        )
        _train(model, [encode(renderer, t) for t in known], recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(model: LlamaForCausalLM, examples: list[tuple[list[int], list[int]]], recipe: ShellRecipe) -> None:
    """AdamW with linear warm-up and decay, loss where the student speaks."""
    length = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in examples])  # causal: padding behind is not seen
    labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in examples])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    model.train()
    for step in range(recipe.steps):
        picks = torch.arange(step * recipe.batch, (step + 1) * recipe.batch) % len(examples)
        rate = recipe.learning_rate * min(1.0, (step + 1) / 10, 2 * (1 - step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(input_ids=ids[picks], labels=labels[picks]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
