"""Protege and TRL's `DistillationTrainer`, one after the other on this machine, on the same work.

    python -m benchmarks.side_by_side student=DIR teacher=DIR prompts=FILE.jsonl trl_python=VENV/bin/python

Same student, teacher, prompts, answer length, batch, learning rate, float32 and exact reverse KL (`beta=1`);
each in its own process with the whole machine. Medians over the steps after the first. TRL is run with
gradient checkpointing off, which is its faster and hungrier setting. `trl_python` is an interpreter
that has `trl` (it is no dependency of ours); without it only Protege is measured.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import chz

from envs import arithmetic
from recipes.cli import run_cli
from recipes.embedded import resolve


@chz.chz
class Config:
    student: str = chz.field(default="embedded:student", doc="model folder")
    teacher: str = chz.field(default="embedded:teacher", doc="model folder")
    prompts: str | None = chz.field(
        default=None, doc="JSONL with `messages`, of which the first batch_size x steps are used; default: additions"
    )
    trl_python: str | None = chz.field(default=None, doc="an interpreter that has trl")
    batch_size: int = chz.field(default=8, doc="prompts per optimizer step")
    micro_batch_size: int = chz.field(default=8, doc="TRL's sequences per forward")
    micro_batch_tokens: int = chz.field(default=128, doc="Protege's tokens per forward")
    max_tokens: int = chz.field(default=64, doc="longest answer")
    steps: int = chz.field(default=4, doc="the first is not counted")
    objectives: tuple[str, ...] = chz.field(default=("jsd", "reverse_kl"), doc="Protege's objectives to measure")


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        if config.prompts is None:
            lines = [json.dumps({"messages": row.messages}) for row in arithmetic.rows("train")]
        else:
            lines = Path(config.prompts).read_text().splitlines()
        prompts.write_text("\n".join(lines[: config.batch_size * config.steps]) + "\n")
        results = {f"protege {o}": _protege(config, o, prompts, Path(folder, o)) for o in config.objectives}
        if config.trl_python is not None:
            results["trl beta=1"] = _trl(config, prompts)
    print(json.dumps({"machine": platform.processor() or platform.machine(), **results}, indent=2))
    peer = results.get("trl beta=1")
    for name, result in results.items():
        if peer is not None and result is not peer:
            print(
                f"{name}: whole step {result['step'] / peer['step']:.2f}x, "
                f"training stage {result['training'] / peer['training']:.2f}x tokens/s, "
                f"peak memory {result['peak_mb'] / peer['peak_mb']:.2f}x"
            )


def _protege(config: Config, objective: str, prompts: Path, run: Path) -> dict[str, float]:
    """Tokens/s from the run's own metrics. The training stage includes the teacher's scoring, as TRL's does."""
    arguments = {
        "model_name": resolve(config.student), "teacher_model": resolve(config.teacher),
        "dataset": prompts, "objective": objective,
        "groups_per_batch": config.batch_size, "max_tokens": config.max_tokens, "max_steps": config.steps,
        "learning_rate": 1e-5, "micro_batch_tokens": config.micro_batch_tokens, "eval_size": 0, "log_path": run,
        "dtype": "float32",
    }  # fmt: skip
    command = [sys.executable, "-m", "recipes.on_policy_distillation"]
    subprocess.run([*command, *(f"{k}={v}" for k, v in arguments.items())], check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "trained_tokens" in row]
    later = steps[1:]

    def rate(*stages: str) -> float:
        return statistics.median(row["trained_tokens"] / sum(row[f"time/{s}"] for s in stages) for row in later)

    return {
        "step": rate("total"),
        "sampling": rate("sampling"),
        "training": rate("scoring", "training"),
        "peak_mb": max(row["peak_memory_mb"] for row in steps),
        "kl": statistics.mean(row["kl"] for row in later),
    }


def _trl(config: Config, prompts: Path) -> dict[str, float]:
    assert config.trl_python is not None
    arguments = {
        "student": resolve(config.student), "teacher": resolve(config.teacher), "prompts": prompts,
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size, "max_tokens": config.max_tokens, "steps": config.steps,
        "gradient_checkpointing": False, "learning_rate": 1e-5,
    }  # fmt: skip
    script = Path(__file__).with_name("trl_peer.py")
    done = subprocess.run(
        [config.trl_python, str(script), *(f"{k}={v}" for k, v in arguments.items())],
        check=True,
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout[done.stdout.index("{") :])
    return {
        "step": report["median_trained_tokens_per_s"],
        "sampling": statistics.median(s["trained_tokens"] / s["generation_s"] for s in report["steps"][1:]),
        "training": report["median_trained_tokens_per_s_training"],
        "peak_mb": report["peak_rss_mb"],
        "kl": statistics.mean(s["loss"] for s in report["steps"][1:]),
    }


if __name__ == "__main__":
    run_cli(main, Config, argv=sys.argv[1:])
