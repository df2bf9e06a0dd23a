"""Faults for a training run in sandboxes, and the books of that run, checked against what really happened."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import docker
import numpy as np
import tiny_models
import torch
from docker.errors import APIError
from requests import RequestException
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors import SandboxUnavailableError
from sandbox.docker_engine import connect
from sandbox.reap import SANDBOX_LABEL
from training.run_dir import read_metrics

PROGRAM = Path(__file__).parent / "scripted_shell_run.py"
TEACHER_TOLERANCE = 1e-3  # between our packed float32 and a plain forward


def sandboxes(client: docker.APIClient, run: str) -> list[dict[str, Any]]:
    return client.containers(all=True, filters={"label": f"{SANDBOX_LABEL}={run}"})


class Faults(threading.Thread):
    """Strikes a sandbox of `run` now and then: kills it, or removes it."""

    def __init__(self, run: str, *, every_s: tuple[float, float], seed: int) -> None:
        super().__init__(daemon=True)
        self.struck: dict[str, str] = {}  # how, by the sandbox's name
        self._run, self._every_s, self._random = run, every_s, random.Random(seed)
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(self._random.uniform(*self._every_s)):
            try:
                with connect() as client:
                    self._strike(client)
            except (APIError, RequestException, SandboxUnavailableError):  # it has just gone, or the engine has
                continue

    def _strike(self, client: docker.APIClient) -> None:
        alive = [found for found in sandboxes(client, self._run) if found["State"] == "running" and found["Names"]]
        if not alive:
            return
        found = self._random.choice(alive)
        strikes: dict[str, Callable[[str], Any]] = {
            "killed": client.kill,
            "removed": partial(client.remove_container, force=True),
        }
        how = self._random.choice(list(strikes))
        self.struck[found["Names"][0].lstrip("/")] = how  # first: even a strike that fails half-way may have hit
        strikes[how](found["Id"])

    def stop(self) -> None:
        self._over.set()
        self.join()


@dataclass
class Outcome:
    """What became of a run: how each of its processes ended, what they said, and which sandboxes were hit."""

    path: Path
    records: list[dict[str, Any]]
    exits: list[int]
    said: str
    struck: dict[str, str]
    restarts: list[tuple[float, float]] = field(default_factory=list)  # of the engine: from, until


def last_step(path: Path) -> int:
    """Of what a run has written so far."""
    if not (path / "metrics.jsonl").exists():
        return 0
    return max((row["step"] for row in read_metrics(path)), default=0)


def run_with_faults(
    argv: Sequence[str],
    path: Path,
    folder: Path,
    *,
    every_s: tuple[float, float],
    restart: tuple[int, Callable[[], None]],
    kill_at: int,
    within_s: float,
    seed: int = 0,
) -> Outcome:
    """Run the recipe to its end, however many times it takes; struck all along, its engine restarted after step
    `restart[0]`, itself killed after step `kill_at`."""
    records, output = folder / "records.jsonl", folder / "output"
    faults = Faults(path.name, every_s=every_s, seed=seed)
    faults.start()
    outcome = Outcome(path, [], [], "", faults.struck)
    until = time.monotonic() + within_s
    killed = False
    try:
        while not outcome.exits or outcome.exits[-1] != 0:
            assert len(outcome.exits) < 5 and time.monotonic() < until, output.read_text()[-3000:]
            with output.open("a") as log:
                process = subprocess.Popen([sys.executable, PROGRAM, records, *argv], stdout=log, stderr=log)
            try:
                while process.poll() is None:
                    assert time.monotonic() < until, f"it takes too long:\n{output.read_text()[-3000:]}"
                    time.sleep(0.2)
                    step = last_step(path)
                    if step >= restart[0] and not outcome.restarts:
                        time.sleep(1.0)  # its next step has begun
                        began = time.time()
                        restart[1]()
                        outcome.restarts.append((began, time.time()))
                    elif step >= kill_at and not killed:
                        time.sleep(1.5)
                        process.send_signal(signal.SIGKILL)
                        killed = True
            finally:
                process.kill()
                outcome.exits.append(process.wait())
    finally:
        faults.stop()
    outcome.said = output.read_text()
    outcome.records = [json.loads(line) for line in records.read_text().splitlines() if line.endswith("}")]
    return outcome


# --- the books


@dataclass(frozen=True)
class Attempt:
    """What the sampler was sent and returned in one episode, and its sandbox. No two of one process are alike:
    each has its own secret."""

    sandbox: str
    turns: tuple[dict[str, Any], ...]

    @property
    def stream(self) -> tuple[int, ...]:
        """All ids up to the last that was sampled."""
        return (*self.turns[-1]["sent"], *self.turns[-1]["returned"])


def attempts(records: Sequence[Mapping[str, Any]]) -> list[Attempt]:
    turns: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["kind"] == "turn":
            turns[record["process"], record["attempt"]].append(dict(record))
    return [Attempt(of_one[0]["sandbox"], tuple(of_one)) for of_one in turns.values()]


def check_stream(attempt: Attempt, episode: Mapping[str, Any], tokenizer: Any) -> None:
    """The saved episode is what the sampler was sent and returned, turn by turn, and every tool result is true."""
    log: list[int] = []
    mask: list[bool] = []
    for n, turn in enumerate(attempt.turns):
        sent = turn["sent"]
        assert turn["turn"] == n and sent[: len(log)] == log
        heard = sent[len(log) :]
        if n:
            check_result(tokenizer.decode(heard), attempt.turns[n - 1]["results"][n - 1])
        mask += [False] * len(heard) + [True] * len(turn["returned"])
        log = sent + turn["returned"]
    assert episode["token_ids"] == log and episode["sampled"] == mask
    assert sum(episode["sampled"]) == sum(len(turn["returned"]) for turn in attempt.turns)
    for name in ("sampler_logprobs", "teacher_logprobs"):
        given = [value is not None and np.isfinite(value) for value in episode[name]]
        assert given == mask, f"{name} are not those of the sampled tokens"


def check_result(heard: str, foretold: str | None) -> None:
    if foretold is None:
        assert "could not be read" in heard
    else:
        readable = foretold.replace("…", "<|unk|>")  # to tokenizers of ASCII alone
        assert f"<tool_response>\n{readable}\n</tool_response>" in heard, (foretold, heard)


def check_books(outcome: Outcome, models: Mapping[str, str], *, steps: int, per_step: int) -> Counter[str]:
    """Every promise about a run's account of itself. Returns what was counted."""
    tokenizer = AutoTokenizer.from_pretrained(models["model_name"])
    teacher = AutoModelForCausalLM.from_pretrained(models["teacher_model"])
    made = attempts(outcome.records)
    by_stream = defaultdict(list)
    for attempt in made:
        by_stream[attempt.stream].append(attempt)
    rows = tiny_models.training_rows(outcome.path)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    counted: Counter[str] = Counter()
    trained: set[str] = set()
    for row in rows:
        dropped = {name: row[name] * per_step for name in row if name.startswith("dropped/")}
        assert all(abs(count - round(count)) < 1e-6 for count in dropped.values())
        assert row["trained_episodes"] + round(sum(dropped.values())) == per_step
        assert abs(row["dropped_fraction"] * per_step - sum(dropped.values())) < 1e-6
        counted.update({name: round(count) for name, count in dropped.items()}, trained=int(row["trained_episodes"]))
        assert row["reward"] == 0.0 and abs(row["ratio/mean"] - 1) < 1e-3 and abs(row["ratio/max"] - 1) < 1e-2
        episodes = tiny_models.episodes(outcome.path, row["step"])
        assert len(episodes) == row["trained_episodes"]
        assert row["trained_tokens"] == sum(sum(episode["sampled"]) for episode in episodes)
        for k, episode in enumerate(episodes):
            last = max(i for i, mask in enumerate(episode["sampled"]) if mask) + 1
            assert last == len(episode["token_ids"]), "an episode ends with what was sampled last"
            (attempt,) = by_stream[tuple(episode["token_ids"])][-1:]  # the last, if a killed process made one like it
            check_stream(attempt, episode, tokenizer)
            trained.add(attempt.sandbox)
            counted["turns"] += len(attempt.turns)
            if k % 8 == 0:
                check_teacher(teacher, episode)
    check_evaluations(outcome, counted)
    check_drops(outcome, trained, made)
    counted["struck"], counted["attempts"] = len(outcome.struck), steps * per_step
    counted["struck after their last command"] = len(trained & outcome.struck.keys())
    return counted


@torch.no_grad()
def check_teacher(teacher: Any, episode: Mapping[str, Any]) -> None:
    """The saved teacher's logprobs are those of a plain forward over the same tokens."""
    ids = torch.tensor(episode["token_ids"])
    plain = teacher(input_ids=ids[None]).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    mask = torch.tensor(episode["sampled"])
    saved = torch.tensor([value for value in episode["teacher_logprobs"] if value is not None])
    difference = (saved - plain[mask[1:]]).abs()
    assert difference.max() < TEACHER_TOLERANCE, (difference.max(), difference.argmax(), len(difference))


def check_evaluations(outcome: Outcome, counted: Counter[str]) -> None:
    """The student solves every held-out task, so that any graded attempt that was not paid was our fault."""
    found = [row for row in read_metrics(outcome.path) if "eval/reward" in row]
    assert found and all(row["eval/reward"] == 1.0 for row in found), [row["eval/reward"] for row in found]
    counted["evaluations"] = len(found)
    counted["graded attempts"] = len([a for a in attempts(outcome.records) if a.turns[0]["evaluated"]])


def check_drops(outcome: Outcome, trained: set[str], made: Sequence[Attempt]) -> None:
    """Nothing was dropped that was not struck, but for what the killed process and steps done anew had made."""
    last = outcome.records[-1]["process"]
    made_at = {r["sandbox"]: r["time"] for r in outcome.records if r["kind"] == "sandbox" and r["process"] == last}
    evaluated = {attempt.sandbox for attempt in made if attempt.turns[0]["evaluated"]}
    lost = {
        name
        for name, born in made_at.items()
        if not any(born < until for _, until in outcome.restarts)
    } - trained - evaluated - outcome.struck.keys()  # fmt: skip
    assert not lost, f"{len(lost)} attempts were dropped, and nothing had happened to their sandboxes: {lost}"


def check_nothing_is_left(path: Path) -> None:
    """No container, and no process that was started for one."""
    with connect() as client:
        until = time.monotonic() + 15
        while (left := sandboxes(client, path.name)) and time.monotonic() < until:
            time.sleep(0.2)
        assert left == []
    ours = [f for f in Path("/proc").glob("[0-9]*/environ") if f"protege-{path.name}".encode() in _bytes(f)]
    assert ours == [], ours


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
