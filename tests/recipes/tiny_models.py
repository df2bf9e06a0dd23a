"""Untrained character-level Llamas of a few thousand weights, and runs of the recipe on them.

`run` trains in this process. `start` does it in a child that is forked from a server which has imported
everything already, so that a run which is killed twenty times costs no imports.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from models import device_thread
from models.transformers_sampler import TransformersSampler
from recipes import engines, on_policy_distillation, training_run
from recipes.cli import parse_config, run_cli
from recipes.embedded import char_tokenizer
from recipes.engines import Engines
from training import loop
from training.learner import Learner
from training.run_dir import read_metrics

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
SMALL = {
    "dataset": "arithmetic", "max_rows": 40, "eval_size": 0, "groups_per_batch": 4, "max_steps": 2, "max_tokens": 6,
    "learning_rate": 1e-2, "warmup_steps": 0, "eval_every": 0, "save_every": 0, "eval_teacher": False,
    "device": "cpu", "sampler_slots": 8,
}  # fmt: skip
"""Options of a run that ends within a second. It evaluates nothing: that would take a third of it."""

EVALUATED = {"eval_size": 4}

REVERSE_KL = {"objective": "reverse_kl"}


def make_model(
    folder: Path,
    *,
    seed: int,
    hidden: int = 16,
    tokenizer: Any = None,
    positions: int = 128,
    extra_vocabulary: int = 0,
) -> str:
    """Save a random model, sharper than at initialisation so that two seeds disagree, and its tokenizer."""
    tokenizer = tokenizer or char_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer) + extra_vocabulary,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=positions,
                initializer_range=0.2,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def argv(log_path: Path, models: dict[str, str], **options: Any) -> list[str]:
    """`SMALL` options with these over them, `a__b` for `a.b`."""
    given = {**SMALL, **models, "log_path": log_path, **{k.replace("__", "."): v for k, v in options.items()}}
    return [f"{key}={value}" for key, value in given.items()]


def run(log_path: Path, models: dict[str, str], *, report: bool = False, **options: Any) -> Path:
    """Train in this process. Returns the run's folder. The report takes longer than the run, so it has its own test."""
    recipe = on_policy_distillation
    with contextlib.nullcontext() if report else no_report():
        recipe.main(parse_config(recipe.Config, argv(log_path, models, **options), presets=recipe.presets))
    return Path(log_path)


@contextlib.contextmanager
def no_report():
    with mock.patch.object(loop, "write_report"), mock.patch.object(training_run, "write_report"):
        yield


@contextlib.contextmanager
def captured_engines() -> Iterator[list[Engines]]:
    """The engines that runs inside this block make, to look at their weights afterwards."""
    made: list[Engines] = []
    build = engines.build_engines

    def keep(*arguments: Any) -> Engines:
        made.append(build(*arguments))
        return made[-1]

    with mock.patch.object(engines, "build_engines", keep):
        yield made


# --- in another process

_outputs: weakref.WeakKeyDictionary[BaseProcess, Path] = weakref.WeakKeyDictionary()
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "recipes.on_policy_distillation"])  # by names that it finds: installed ones


def start(
    argv: Sequence[str],
    output: Path,
    *,
    interrupt: tuple[str, int] | None = None,
    recipe: str = "on_policy_distillation",
    first: Callable[[], None] | None = None,
) -> BaseProcess:
    """`python -m recipes.RECIPE argv…` in a child process, both streams to the file `output`.

    `interrupt=(phase, step)`: it sends itself SIGINT in the midst of that phase after so many steps. `first`: a
    function of a test module that it calls before anything else."""
    process = _SERVER.Process(target=_child, args=(list(argv), str(output), interrupt, recipe, first))
    process.start()
    _outputs[process] = output
    return process


def _child(
    argv: list[str], output: str, interrupt: tuple[str, int] | None, recipe: str, first: Callable[[], None] | None
) -> None:
    faulthandler.enable()  # see `finish`
    gc.freeze()  # what the server imported stays: it is not looked at, and so not copied
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to Ctrl-C
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if interrupt is not None and interrupt[0].startswith("pack in "):
        where, _, number = interrupt[0].removeprefix("pack in ").partition(":")
        _interrupt_pack(where, int(number))
    elif interrupt is not None:
        _interrupt_in(*interrupt)
    if first is not None:
        first()
    module = importlib.import_module(f"recipes.{recipe}")
    with no_report():
        run_cli(module.main, module.Config, presets=getattr(module, "presets", None), argv=argv)


def _interrupt_pack(phase: str, number: int) -> None:
    """Have the first micro-batch of an evaluation or of training be interrupted, and say which ones are begun."""
    run_pack, begun = Learner._run_pack, []

    def counted(self: Learner, batch: Any, objective: Any, train: bool) -> Any:
        if train == (phase == "training"):
            begun.append(batch)
            print(f"pack {len(begun)} of many", flush=True)
            if len(begun) == 1:
                os.kill(os.getpid(), number)
                deadline = time.monotonic() + 30
                while not device_thread._thread.call.cancelled:  # while this thread still computes
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
        return run_pack(self, batch, objective, train)

    Learner._run_pack = counted  # type: ignore[method-assign]


def _interrupt_in(phase: str, step: int) -> None:
    """Have the first computation of that phase, after `step` steps, be interrupted while it goes on.

    `update` is the first optimizer step."""
    owner: Any = Learner if phase in ("training", "update") else TransformersSampler
    name = {"training": "forward_backward", "update": "step"}.get(phase, "_advance")
    compute, train_step = getattr(owner, name), loop.Loop.train_step
    now = {"step": 0, "training": False}

    def interrupted(*arguments: Any) -> Any:
        if now == {"step": step, "training": phase != "evaluation"}:
            now["step"] = -1000
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # the event loop sees the signal while this thread still computes
        return compute(*arguments)

    async def counted(self: loop.Loop) -> None:
        now["training"] = True
        await train_step(self)
        now.update(step=now["step"] + 1, training=False)

    setattr(owner, name, interrupted)
    loop.Loop.train_step = counted


def finish(process: BaseProcess, timeout_s: float = 120) -> int:
    process.join(timeout_s)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGABRT)  # it says where each of its threads is
        process.join(10)
        process.kill()
        process.join()
        raise TimeoutError(f"the run did not end within {timeout_s} s:\n{_outputs[process].read_text()}")
    return process.exitcode


# --- what a run left behind


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    adapter = checkpoint / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else checkpoint / "model.safetensors")


def final(run_path: Path) -> Path:
    """The last checkpoint."""
    return sorted((run_path / "checkpoints").iterdir())[-1]


def training_rows(run_path: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_path) if "trained_tokens" in row]


def evaluation_rows(run_path: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_path) if any(name.startswith("eval/") for name in row)]


def episodes(run_path: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_path / "episodes" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def fingerprint(run_path: Path) -> dict[str, Any]:
    """Everything that must be the same, bit for bit, in two runs that are the same but for the clock."""
    checkpoint = final(run_path)
    state = torch.load(checkpoint / "trainer_state" / "optimizer.pt", weights_only=True)
    rows = [
        {k: v for k, v in row.items() if not k.startswith("time/") and k not in ("tokens_per_s", "peak_memory_mb")}
        for row in read_metrics(run_path)
    ]
    return {
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights(checkpoint).items()},
        "optimizer": {
            (i, name): value.numpy().tobytes() for i, s in state["state"].items() for name, value in s.items()
        },
        "groups": json.dumps(state["param_groups"], sort_keys=True),
        "average": averages(checkpoint),
        "state": (checkpoint / "trainer_state" / "state.json").read_text(),
        "metrics": rows,
        "episodes": {f.name: f.read_text() for f in sorted((run_path / "episodes").iterdir())},
    }


def averages(checkpoint: Path) -> dict[str, bytes]:
    """The bits of the student's average, where it is a teacher."""
    file = checkpoint / "trainer_state" / "average.safetensors"
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()} if file.exists() else {}


def leftovers(folder: Path) -> list[str]:
    """What a write that was not finished leaves behind."""
    return [str(p) for p in folder.rglob("*") if p.name.startswith((".tmp-", ".old-"))]


def copy_without(source: str, target: Path, *patterns: str) -> str:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*patterns))
    return str(target)
