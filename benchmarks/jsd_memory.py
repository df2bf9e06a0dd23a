"""Peak memory of an exact full-vocabulary JSD: one step's loss and gradient over a large vocabulary.

    .venv/bin/python -m benchmarks.jsd_memory
    .venv/bin/python -m benchmarks.jsd_memory beta=1 device=cuda
    .venv/bin/python -m benchmarks.jsd_memory trl_python=/path/to/an/environment/with/trl/bin/python

Student and teacher are little more than their heads. What is printed is the growth over the moment before the
step, when weights, their gradients and both models' hidden states have been there: on a CPU of the process's
resident memory, looked at every millisecond; on CUDA of what torch has allocated.

With `trl_python`, the chunked divergence of TRL's `DistillationTrainer` follows, in a process of its own, on the same
hidden states and heads (`jsd_trl_peer.py`), and both losses and gradients of the head are compared. Ours has a trunk
of one layer to run besides.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import chz
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peak_memory import MIB, measured
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

PROMPT = 8  # tokens before the trained ones


@chz.chz
class Config:
    """One `Learner.forward_backward` with `JSD` on one episode."""

    vocab: int = chz.field(default=151_936, doc="size of both vocabularies")
    tokens: int = chz.field(default=4096, doc="trained tokens")
    hidden: int = chz.field(default=64, doc="size of the hidden states")
    beta: float = chz.field(default=0.5, doc="of the JSD")
    device: str = chz.field(default="auto", doc="auto, cpu, cuda or cuda:N")
    trl_python: str | None = chz.field(default=None, doc="a Python that has trl, to measure it on the same tensors")


def main(config: Config) -> None:
    device = default_device(config.device)
    student, teacher = (make_model(config, seed, device) for seed in (0, 1))
    learner = Learner(student, token_budget=config.tokens + PROMPT)
    objective = JSD(beta=config.beta)
    learner.forward_backward([make_item(config, teacher, tokens=16)], objective)  # makes the gradients' tensors
    for parameter in learner.parameters:
        assert parameter.grad is not None
        parameter.grad.zero_()
    item = make_item(config, teacher, tokens=config.tokens)
    gc.collect()
    with measured(device) as found:
        (metrics,) = learner.forward_backward([item], objective)
    logits = config.tokens * config.vocab * 4 / MIB
    print(f"{device}: {config.tokens} tokens, vocabulary of {config.vocab}, beta {config.beta}, {_seconds(found)}")
    print(f"peak above weights, gradients and the teacher's hidden states: {found['mib']:.0f} MiB")
    print(f"all logits of one model alone, which are never held: {logits:.0f} MiB")
    if config.trl_python is not None:
        theirs = trl(config, student, teacher, item)
        head: Any = student.model.get_output_embeddings()
        ours = {"loss": metrics.values["loss"].mean(), "head gradient": head.weight.grad.norm().item()}
        print(f"TRL {theirs['trl']}: {_seconds(theirs)}, peak {theirs['mib']:.0f} MiB")
        for label, name in (("processor time", "cpu_s"), ("time", "s"), ("memory", "mib")):
            print(f"{label}: Protege takes {found[name] / theirs[name]:.2f} of what TRL takes")
        for name, value in ours.items():
            print(f"{name}: {value:.7g} here, {theirs[name]:.7g} there")


def _seconds(found: dict[str, Any]) -> str:
    return f"{found['s']:.1f} s ({found['cpu_s']:.1f} s of processors)"


def trl(config: Config, student: CausalLM, teacher: CausalLM, item: TrainingItem) -> dict[str, Any]:
    """What TRL takes for the same positions: seconds, MiB, loss, and the norm of the head's gradient."""
    rows = torch.from_numpy(np.flatnonzero(item.episode.sampled)) - 1
    assert item.signal is not None and item.signal.hidden is not None
    with torch.no_grad():
        hidden = student.hidden([torch.from_numpy(item.episode.token_ids).long()])[rows.to(student.device)]
    heads: list[Any] = [lm.model.get_output_embeddings() for lm in (student, teacher)]
    tensors = [hidden, heads[0].weight.data, item.signal.hidden, heads[1].weight.data]
    with tempfile.TemporaryDirectory() as folder:
        torch.save([x.cpu() for x in tensors], Path(folder) / "tensors.pt")
        command = [
            str(config.trl_python),
            "-m",
            "benchmarks.jsd_trl_peer",
            folder,
            str(config.beta),
            str(student.device),
        ]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


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


if __name__ == "__main__":
    run_cli(main, Config, argv=sys.argv[1:])
