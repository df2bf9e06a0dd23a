"""Models and tokenizers of a few thousand weights, made inside a test: random, seeded, in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from models import attention

torch.set_num_threads(1)  # two threads on such models only wait for each other, 100 times slower on busy cores

VOCAB = 61
WINDOW = 4  # of the architectures with sliding-window attention

TRANSFORMER: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


def _gemma2() -> Gemma2Config:
    # Both caps bite: with the usual 50 and 30 random weights of this size never reach them.
    caps: dict[str, Any] = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    return Gemma2Config(**TRANSFORMER, sliding_window=WINDOW, **caps)


def _gpt_oss() -> GptOssConfig:
    return GptOssConfig(**TRANSFORMER, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1)


CONFIGS = {
    "llama": lambda: LlamaConfig(**TRANSFORMER),
    "qwen3": lambda: Qwen3Config(**TRANSFORMER),
    "mistral": lambda: MistralConfig(**TRANSFORMER, sliding_window=WINDOW),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "gemma2": _gemma2,
    "gpt_oss": _gpt_oss,
    "mamba": lambda: MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
}
ARCHITECTURES = tuple(CONFIGS)
PACKED = {"llama", "qwen3", "mistral", "gpt2"}  # the others need padding


def model(
    architecture: str = "llama", *, seed: int = 0, scale: float = 8.0, attn: str = attention.NAME, **changes: Any
) -> Any:
    """A random model. `scale` widens its weights: at the usual 0.02 every distribution is flat, and a
    wrong token, position or mask would go unseen."""
    config = CONFIGS[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture == "mamba":
            attn = "eager"
        made = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
        with torch.no_grad():
            for p in made.parameters():
                if p.dim() == 2:
                    p.mul_(scale)
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made.eval()


def vllm_model(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random model of head size 32, the smallest that vLLM's attention on CPUs takes."""
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return model(architecture, seed=seed, **{**heads, **changes})


def vllm_folder(folder: Path, model: Any, tokenizer: Any = None) -> str:
    """Model and tokenizer, as vLLM loads them. The tokenizer has one id per letter if none is given."""
    model.save_pretrained(folder)
    (tokenizer or letters()).save_pretrained(folder)
    return str(folder)


def plain_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """float32 logits `[T, v]` of one sequence by the model's own forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def plain_logprobs(model: Any, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> Tensor:
    """log-probabilities of the answer's ids after the prompt, each after those before it."""
    logits = plain_logits(model, [*prompt, *answer])[len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(list(answer))[:, None])[:, 0]


def plain_distribution(model: Any, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """`[T - 1, v]` log-probabilities of every id at the positions 1 … T-1."""
    return (plain_logits(model, ids)[:-1] / temperature).log_softmax(-1)


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return out[0, len(prompt) :].tolist()


def prompts(count: int, *, shortest: int = 1, longest: int = 12, seed: int = 0) -> list[list[int]]:
    """Prompts of unlike lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def letters() -> PreTrainedTokenizerFast:
    """One id per character, 61 of them; `<eos>` is the last."""
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?-:"
    vocab = {c: i for i, c in enumerate(characters)} | {"<unk>": len(characters), "<eos>": len(characters) + 1}
    assert len(vocab) == VOCAB
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


def chat(
    template: str | None,
    *,
    eos: str,
    extra: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = (("t", "h"), ("th", "e"), ("i", "n")),
    vocab: dict[str, int] | None = None,
) -> Any:
    """Byte-level BPE with a few merges, the control tokens of two chat formats, and `extra` ones."""
    if vocab is None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(m) for m in merges)])}
    backend = Tokenizer(models.BPE(vocab, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|turn|>", "<|end|>", *extra)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


CHATML = """{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# another format altogether: other control tokens, the role in brackets, nothing after a turn
BRACKETS = """{%- for m in messages -%}{{- '<|turn|>[' + m.role + '] ' + m.content + '<|end|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn|>[assistant] ' -}}{%- endif -%}"""
