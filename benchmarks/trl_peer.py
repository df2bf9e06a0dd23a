"""Measures TRL's `DistillationTrainer` (trl 1.16), the peer that Protege is compared with.

Not part of the package and not imported by it: TRL is no dependency. It runs in any environment that
has trl, on the same student, teacher, prompts, lengths and thread count as the run it stands beside:

    python benchmarks/trl_peer.py student=FOLDER teacher=FOLDER prompts=rows.jsonl \
        max_tokens=64 batch_size=8 steps=3 seed=0 gradient_checkpointing=false > trl.json

`key=value` or `--key value`; `--help` lists them. Rows are JSONL with `messages`, ending in a user turn.
The clocks wrap the trainer's own methods from outside, nothing in it is changed:

- generation: `_generate_and_score_completions` (chat template, `generate`, padding);
- training: `compute_loss` (student and teacher forward, heads, divergence), backward, and everything
  from there to the end of the optimizer step (gradient clipping, AdamW, scheduler, zero_grad);
- step: from `on_step_begin` to `on_step_end`; fetching the rows, before it, is all that is left out.

A trained token is a position of the completion mask, the sampled stop token included. Rates are medians
over the steps after the first. Peak memory is the process's high-water mark (it includes loading) and,
with a GPU, the allocator's.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time

import torch
import transformers
import trl  # type: ignore[import-not-found]
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer  # type: ignore[import-not-found]


class Clock(TrainerCallback):
    """One record per optimizer step: seconds of each stage, tokens, loss."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []
        self.current: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        self.current[stage] = self.current.get(stage, 0.0) + seconds

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # transformers fetches the batch before this event, generates inside training_step after it
        self.current = {"started": now()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.current["optimizer_started"] = now()  # gradients are clipped by now

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.add("optimizer_s", now() - self.current.pop("optimizer_started"))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        record = self.current
        record["step_s"] = now() - record.pop("started")
        record["training_s"] = record["step_s"] - record["generation_s"]
        record["backward_s"] = record["training_s"] - record["forward_s"] - record["optimizer_s"]
        self.records.append(record)


class TimedTrainer(DistillationTrainer):
    """TRL's trainer with stopwatches around its methods."""

    clock: Clock

    def _generate_and_score_completions(self, inputs):
        start = now()
        batch = super()._generate_and_score_completions(inputs)
        self.clock.add("generation_s", now() - start)
        mask = batch["completion_mask"]
        self.clock.add("trained_tokens", int(mask.sum()))
        self.clock.add("forward_positions", batch["prompt_ids"].numel() + mask.numel())
        self.clock.add("real_positions", int(batch["prompt_mask"].sum() + mask.sum()))
        self.clock.add("head_positions", mask.numel())
        return batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        start = now()
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.clock.add("forward_s", now() - start)
        self.clock.add("loss", float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def options() -> argparse.Namespace:
    def switch(text: str) -> bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--student", required=True, help="model folder")
    parser.add_argument("--teacher", required=True, help="model folder")
    parser.add_argument("--prompts", required=True, help="JSONL, rows with `messages`")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts per optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=0, help="0: the whole batch in one pass")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--gradient-checkpointing", type=switch, default=True, help="TRL's default: true")
    parser.add_argument("--shuffle", type=switch, default=False, help="false: rows in the file's order")
    parser.add_argument("--max-prompts", type=int, default=0, help="use the first N rows; 0: all")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's default")
    arguments = []
    for argument in sys.argv[1:]:
        key, equals, value = argument.partition("=")
        if equals and not argument.startswith("-"):
            arguments += ["--" + key.replace("_", "-"), value]
        else:
            arguments.append(argument)
    return parser.parse_args(arguments)


def prompt_rows(path: str, limit: int) -> Dataset:
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line in lines if line.strip()]
    return Dataset.from_list([{"prompt": messages} for messages in (rows[:limit] if limit else rows)])


def train(opt: argparse.Namespace, scratch: str) -> tuple[list[dict[str, float]], dict]:
    micro = opt.micro_batch_size or opt.batch_size
    if opt.batch_size % micro:
        raise SystemExit(f"micro_batch_size={micro} must divide batch_size={opt.batch_size}")
    config = DistillationConfig(
        output_dir=scratch,
        beta=1.0,
        temperature=1.0,
        max_completion_length=opt.max_tokens,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=opt.batch_size // micro,
        max_steps=opt.steps,
        learning_rate=opt.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        seed=opt.seed,
        shuffle_dataset=opt.shuffle,
        bf16=False,
        fp16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=opt.gradient_checkpointing,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(opt.student, padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(opt.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(opt.teacher, dtype=torch.float32)
    clock = Clock()
    trainer = TimedTrainer(
        model=student,  # type: ignore[arg-type]
        teacher_model=teacher,
        args=config,
        train_dataset=prompt_rows(opt.prompts, opt.max_prompts),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.clock = clock
    loaded_mb = peak_rss_mb()
    trainer.train()
    return clock.records, {"peak_rss_mb_after_loading": loaded_mb, "device": str(trainer.args.device)}


def peak_rss_mb() -> float:
    scale = 1 << 20 if platform.system() == "Darwin" else 1 << 10  # bytes there, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)


def report(opt: argparse.Namespace, records: list[dict[str, float]], extra: dict) -> dict:
    warm = records[1:] or records
    for record in records:
        record["trained_tokens_per_s"] = record["trained_tokens"] / record["step_s"]
        record["trained_tokens_per_s_training"] = record["trained_tokens"] / record["training_s"]
    gpu = round(torch.cuda.max_memory_allocated() / (1 << 20), 1) if torch.cuda.is_available() else None
    return {
        "trainer": "trl.DistillationTrainer",
        "options": vars(opt),
        **{
            f"median_{key}": statistics.median(record[key] for record in warm)
            for key in (
                "step_s",
                "generation_s",
                "training_s",
                "trained_tokens_per_s",
                "trained_tokens_per_s_training",
            )
        },
        "final_loss": records[-1]["loss"],
        "peak_rss_mb": peak_rss_mb(),
        "peak_gpu_mb": gpu,
        **extra,
        "steps": records,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }


def main() -> None:
    opt = options()
    if opt.threads:
        torch.set_num_threads(opt.threads)
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # Whatever the trainer prints goes to stderr: stdout carries the report and nothing else.
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        with tempfile.TemporaryDirectory() as scratch:
            records, extra = train(opt, scratch)
    finally:
        sys.stdout = stdout
    print(json.dumps(report(opt, records, extra), indent=2))


if __name__ == "__main__":
    main()
