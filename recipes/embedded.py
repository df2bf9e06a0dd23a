"""The demo's models: a tiny teacher that can add and a tinier student that hardly can, made on first use.

Both are character-level Llamas, trained here on worked two-digit additions by plain supervised learning (not
part of Protege proper, so it uses nothing of it), and kept in the cache folder: $PROTEGE_CACHE, or
~/.cache/protege. Name them in any recipe as `embedded:teacher` and `embedded:student`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from envs.arithmetic import ALPHABET, rows
from envs.datasets import Row
from errors import ConfigError
from models.cpu_matmul import use_fast_exact_matmul
from models.device_thread import compute_blocking

PREFIX = "embedded:"
_SPECIAL = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
_PAD = 0
_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How one embedded model is made. A changed recipe is another model: its hash names the cache entry."""

    hidden: int
    layers: int
    heads: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    version: int = 1


class ShellRecipe(Recipe):
    """Of a model for the tool demo: see `recipes/embedded_shell.py`."""


RECIPES: dict[str, Recipe] = {
    "teacher": Recipe(hidden=128, layers=3, heads=4, steps=260, batch=96, learning_rate=3e-3, seed=1),
    "student": Recipe(hidden=96, layers=2, heads=4, steps=110, batch=128, learning_rate=1e-3, seed=2),
    "shell-teacher": ShellRecipe(hidden=128, layers=2, heads=4, steps=120, batch=8, learning_rate=5e-3, seed=1),
    "shell-student": ShellRecipe(hidden=96, layers=2, heads=4, steps=70, batch=8, learning_rate=5e-3, seed=2),
}


def resolve(name: str, message: Callable[[str], None] = print) -> str:
    """The folder of an `embedded:` model, made if it is not cached; any other name as it is."""
    if not name.startswith(PREFIX):
        return name
    key = name.removeprefix(PREFIX)
    if key not in RECIPES:
        raise ConfigError(f"{name}: expected one of {', '.join(PREFIX + k for k in RECIPES)}")
    recipe = RECIPES[key]
    digest = hashlib.sha256(repr(sorted(asdict(recipe).items())).encode()).hexdigest()[:12]
    root = Path(os.environ.get("PROTEGE_CACHE", "~/.cache/protege")).expanduser() / "embedded"
    folder = root / f"{key}-{digest}"
    if not folder.exists():
        message(f"making the demo's {key} once ({recipe.steps} steps; cached in {folder})")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".tmp-", ignore_cleanup_errors=True) as temporary:
            made = Path(temporary, key)
            compute_blocking(_make, recipe, made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # else another process made it meanwhile: the same, by its seed
                    raise
    return str(folder)


def char_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the arithmetic task, one special token per role."""
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *ALPHABET])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")  # type: ignore[assignment]
    backend.decoder = Fuse()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        additional_special_tokens=_SPECIAL[3:],
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _make(recipe: Recipe, folder: Path) -> None:
    if isinstance(recipe, ShellRecipe):
        from recipes import embedded_shell  # here, because only this needs the tasks and what they import

        embedded_shell.make(recipe, folder)
        return
    use_fast_exact_matmul()
    tokenizer = char_tokenizer()
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
                max_position_embeddings=128,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=_SPECIAL.index("<|end|>"),
                pad_token_id=_PAD,
            )
        )
        model.set_attn_implementation("eager")  # the fastest for sequences this short
        _train(model, tokenizer, rows("train"), recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: list[Row], recipe: Recipe) -> None:
    """Supervised learning on worked additions: AdamW, linear warm-up and decay, loss on the answer only."""
    examples = [_encode(tokenizer, row) for row in data]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    model.train()
    for step in range(recipe.steps):
        picks = torch.randint(len(examples), (recipe.batch,), generator=generator).tolist()
        ids = torch.nn.utils.rnn.pad_sequence([examples[i][0] for i in picks], True, _PAD)
        labels = torch.nn.utils.rnn.pad_sequence([examples[i][1] for i in picks], True, -100)
        rate = recipe.learning_rate * min(1.0, (step + 1) / 30, 2 * (1 - step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def _encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = tokenizer.apply_chat_template(list(row.messages), add_generation_prompt=True, tokenize=False)
    head = tokenizer.encode(prompt, add_special_tokens=False)  # type: ignore[arg-type]
    tail = tokenizer.encode(f"{row.completion}<|end|>", add_special_tokens=False)
    return torch.tensor(head + tail), torch.tensor([-100] * len(head) + tail)
