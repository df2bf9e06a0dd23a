"""Peak memory of an exact full-vocabulary JSD: one step's loss and gradient over a large vocabulary.

    .venv/bin/python -m benchmarks.jsd_memory
    .venv/bin/python -m benchmarks.jsd_memory beta=1 device=cuda

Student and teacher are little more than their heads. What is printed is the growth over the moment before the
step, when weights, their gradients and both models' hidden states have been there: on a CPU of the process's
resident memory, looked at every millisecond; on CUDA of what torch has allocated.
"""

from __future__ import annotations

import gc
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chz
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from envs.types import Episode, StopReason, Turn
from models import attention
from models.causal_lm import CausalLM
from models.checks import default_device
from models.transformers_scorer import TransformersScorer
from models.types import SignalKind, TeacherView
from recipes.cli import run_cli
from training.distribution_losses import JSD
from training.learner import Learner
from training.packing import TrainingItem

MIB = 2**20
PROMPT = 8  # tokens before the trained ones


@chz.chz
class Config:
    """One `Learner.forward_backward` with `JSD` on one episode."""

    vocab: int = chz.field(default=151_936, doc="size of both vocabularies")
    tokens: int = chz.field(default=4096, doc="trained tokens")
    hidden: int = chz.field(default=64, doc="size of the hidden states")
    beta: float = chz.field(default=0.5, doc="of the JSD")
    device: str = chz.field(default="auto", doc="auto, cpu, cuda or cuda:N")


def main(config: Config) -> None:
    device = default_device(config.device)
    student, teacher = (make_model(config, seed, device) for seed in (0, 1))
    learner = Learner(student, token_budget=config.tokens + PROMPT)
    objective = JSD(beta=config.beta)
    learner.forward_backward([make_item(config, teacher, tokens=16)], objective)  # makes the gradients' tensors
    item = make_item(config, teacher, tokens=config.tokens)
    gc.collect()
    with measured(device) as found:
        learner.forward_backward([item], objective)
    logits = config.tokens * config.vocab * 4 / MIB
    print(f"{device}: {config.tokens} tokens, vocabulary of {config.vocab}, beta {config.beta}, {found['s']:.1f} s")
    print(f"peak above weights, gradients and the teacher's hidden states: {found['mib']:.0f} MiB")
    print(f"all logits of one model alone, which are never held: {logits:.0f} MiB")


def make_model(config: Config, seed: int, device: torch.device) -> CausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.hidden,
            intermediate_size=config.hidden,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=config.tokens + PROMPT,
        )
    )
    model.set_attn_implementation(attention.NAME)
    return CausalLM(model.to(device))  # type: ignore[arg-type]


def make_item(config: Config, teacher: CausalLM, tokens: int) -> TrainingItem:
    length = PROMPT + tokens
    ids = np.random.default_rng(0).integers(0, config.vocab, length)
    sampled = np.arange(length) >= PROMPT
    episode = Episode(
        dataset="benchmark",
        row_id="row",
        teacher="teacher",
        prompt_messages=(),
        teacher_messages=None,
        token_ids=ids.astype(np.int32),
        sampled=sampled,
        sampler_logprobs=np.where(sampled, -1.0, np.nan).astype(np.float32),
        turns=(Turn(PROMPT, length),),
        stop_reason=StopReason.MAX_TOKENS,
    )
    positions = np.flatnonzero(sampled)
    (signal,) = TransformersScorer("teacher", teacher)._score([TeacherView(ids, positions, positions)], SignalKind.FULL)
    return TrainingItem(episode, signal)


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Growth of memory at its highest, and seconds."""
    found: dict[str, float] = {}
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found["mib"] = (torch.cuda.max_memory_allocated(device) - before) / MIB
    else:
        before, highest, done = resident(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.001):
                highest[0] = max(highest[0], resident())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join()
        found["mib"] = (highest[0] - before) / MIB
    found["s"] = time.perf_counter() - start


def resident() -> int:
    """Bytes of this process in memory. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    run_cli(main, Config, argv=sys.argv[1:])
