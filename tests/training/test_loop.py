"""The loop with scripted engines: its schedule, its order, its drops, and what a checkpoint holds."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import pytest
from test_collect import Row as Builder
from test_collect import ScriptedSampler, ScriptedScorer, teacher

from envs.datasets import Cursor, Row
from errors import CheckpointError, DataError, NoSignalError, ProtegeError
from training import loop as module
from training.learner import ItemMetrics
from training.loop import DatasetPlan, Loop, LoopConfig, learning_rate
from training.objectives import ReverseKL
from training.packing import TrainingItem
from training.run_dir import open_run_dir


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_report", lambda path: None)


class Tokenizer:
    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


class Renderer:
    tokenizer = Tokenizer()

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


@dataclass
class RecordingLearner:
    """Writes down what it is asked. Its KL of a token is the token's id."""

    calls: list[Any] = field(default_factory=list)
    averaged: list[int] = field(default_factory=list)  # after how many calls
    lm: Any = field(default_factory=lambda: SimpleNamespace(device="cpu"))

    def forward_backward(self, items: Sequence[TrainingItem], objective: Any, scales: Any = None) -> list[ItemMetrics]:
        self.calls.append([int(item.episode.token_ids[1]) for item in items])
        return self.measure(items, objective)

    def measure(self, items: Sequence[TrainingItem], objective: Any) -> list[ItemMetrics]:
        ids = [item.episode.token_ids[item.episode.sampled].astype(float) for item in items]
        return [ItemMetrics(len(i), {"kl": i, "ratio": np.ones(len(i)), "teacher_logprob": -i}) for i in ids]

    def step(self, rate: float) -> dict[str, float]:
        self.calls.append(rate)
        return {"learning_rate": rate}

    def update_average(self) -> None:
        self.averaged.append(len(self.calls))

    def weights(self) -> Any:
        return "the learner's weights"

    def save(self, folder: Path) -> None:
        (folder / "trainer_state").mkdir()
        (folder / "weights").write_text(json.dumps(self.calls))

    def load_optimizer(self, folder: Path) -> None:
        if not (folder / "weights").exists():
            raise CheckpointError(f"{folder}: no weights")


@dataclass
class Tracker:
    rows: list[Any] = field(default_factory=list)

    def log(self, row: Any) -> None:
        self.rows.append(row)


def plan(name: str, first: int, groups: int, rows: int = 6, **options: Any) -> DatasetPlan:
    data = [Row(str(first + i), ({"role": "user", "content": "?"},)) for i in range(rows)]
    return DatasetPlan(
        name, Cursor(data, seed=0), groups, lambda row: Builder(int(row.row_id), dataset=name, **options)
    )


@dataclass
class Made:
    loop: Loop
    learner: RecordingLearner
    sampler: ScriptedSampler
    tracker: Tracker

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self.loop.run_dir.read_metrics()


def make(
    folder: Path,
    plans: Sequence[DatasetPlan] = (),
    sampler: ScriptedSampler | None = None,
    scorer: ScriptedScorer | None = None,
    **config: Any,
) -> Made:
    sampler = sampler or ScriptedSampler()
    learner, tracker = RecordingLearner(), Tracker()
    scorer = scorer or ScriptedScorer()
    progress: Any = SimpleNamespace(update=lambda row: None, message=lambda text: None)
    loop = Loop(
        config=LoopConfig(**{"max_steps": 2, "learning_rate": 0.5, **config}),
        plans=plans or [plan("data", 20, 3)],
        eval_sets=[],
        sampler=sampler,
        teachers={"big": teacher(scorer), "small": teacher(scorer)},
        learner=learner,  # type: ignore[arg-type]
        objective=ReverseKL(),
        renderer=Renderer(),  # type: ignore[arg-type]
        run_dir=open_run_dir(folder, {}, "ask"),
        trackers=tracker,  # type: ignore[arg-type]
        progress=progress,
    )
    return Made(loop, learner, sampler, tracker)


# --- the schedule


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),  # 0 would be that of a fifth step
        ("linear", 2, [0.5, 1, 1, 0.5]),
        ("cosine", 0, [1, 0.853553, 0.5, 0.146447]),
        ("cosine", 2, [0.5, 1, 1, 0.5]),
        ("linear", 4, [0.25, 0.5, 0.75, 1]),
        ("cosine", 8, [0.125, 0.25, 0.375, 0.5]),  # a warm-up longer than the run
    ],
)
def test_the_learning_rate(schedule: Any, warmup: int, rates: list[float]):
    config = LoopConfig(max_steps=4, learning_rate=2.0, schedule=schedule, warmup_steps=warmup)
    assert [learning_rate(config, step) for step in range(4)] == pytest.approx([2 * rate for rate in rates], abs=1e-6)


@pytest.mark.anyio
async def test_every_step_trains_at_its_own_rate(tmp_path: Path):
    made = make(tmp_path / "run", max_steps=3, schedule="linear")
    await made.loop.run()
    assert [call for call in made.learner.calls if isinstance(call, float)] == pytest.approx([0.5, 1 / 3, 1 / 6])
    assert [row["learning_rate"] for row in made.metrics] == pytest.approx([0.5, 1 / 3, 1 / 6])
    assert [row["step"] for row in made.tracker.rows] == [1, 2, 3]


# --- the order of things


@pytest.mark.anyio
@pytest.mark.parametrize(("substeps", "sizes"), [(1, [5]), (2, [2, 3]), (5, [1] * 5), (8, [1] * 5)])
async def test_substeps_take_whole_groups_in_order(substeps: int, sizes: list[int], tmp_path: Path):
    made = make(tmp_path / "run", [plan("data", 20, 5, group_size=2)], max_steps=1, num_substeps=substeps)
    await made.loop.run()
    parts, rates = made.learner.calls[::2], made.learner.calls[1::2]
    assert [len(part) for part in parts] == [2 * size for size in sizes] and rates == [0.5] * len(sizes)
    flat = [number for part in parts for number in part]
    assert flat[::2] == flat[1::2] and sorted(set(flat)) == sorted(flat[::2])
    expected = [int(row.row_id) for row in plan("data", 20, 5).cursor.next(5)]
    assert flat[::2] == expected
    assert made.learner.averaged == [2 * len(sizes)]  # a teacher that is the average changes between batches alone


@pytest.mark.anyio
async def test_every_row_is_used_once_an_epoch_and_epochs_are_counted(tmp_path: Path):
    made = make(tmp_path / "run", [plan("data", 20, 3, rows=6)], max_steps=4)
    await made.loop.run()
    batches = [set(call) for call in made.learner.calls[::2]]
    assert batches[0] | batches[1] == batches[2] | batches[3] == set(range(20, 26))
    assert [row["dataset/data/epoch"] for row in made.metrics] == [0, 0, 1, 1]


# --- drops


@pytest.mark.anyio
async def test_drops_are_fractions_of_all_attempts_and_stay_with_their_dataset(tmp_path: Path):
    plans = [plan("a", 20, 2, group_size=2, teacher="big"), plan("b", 40, 2, group_size=2, teacher="small")]
    sampler = ScriptedSampler(fails=lambda number, call: number < 40 and call == 0)
    scorer = ScriptedScorer(bad=frozenset({40}))
    made = make(tmp_path / "run", plans, sampler, scorer, max_steps=1)
    rows = {int(row.row_id) for row in plan("b", 40, 2).cursor.next(2)}
    bad = 2 * (40 in rows)  # both attempts at row 40, if it was drawn
    await made.loop.run()
    (row,) = made.metrics
    assert row["dropped_fraction"] == (2 + bad) / 8
    assert row["dropped/sampler"] == 2 / 8 and row.get("dropped/teacher", 0) == bad / 8
    assert row["dataset/a/dropped_fraction"] == row["teacher/big/dropped_fraction"] == 2 / 4
    assert row["dataset/b/dropped_fraction"] == row["teacher/small/dropped_fraction"] == bad / 4
    assert row["trained_episodes"] == 6 - bad and row["dataset/a/trained_episodes"] == 2
    episodes = [json.loads(line) for line in (tmp_path / "run/episodes/step_000001.jsonl").read_text().splitlines()]
    assert {(e["dataset"], e["teacher"], int(e["row_id"].removeprefix("row")) < 40) for e in episodes} == {
        ("a", "big", True), ("b", "small", False),
    }  # fmt: skip
    # A mean over tokens, not over datasets: the scripted KL of a token is its id.
    ids = [i for e in episodes for i, s in zip(e["token_ids"], e["sampled"], strict=True) if s]
    assert row["kl"] == pytest.approx(np.mean(ids)) and row["trained_tokens"] == len(ids)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("limit", "failing", "fails"), [(0.5, 2, False), (0.5, 3, True), (0.0, 1, True), (1.0, 3, False)]
)
async def test_more_than_max_dropped_fraction_fails_with_the_reason(
    limit: float, failing: int, fails: bool, tmp_path: Path
):
    chosen = [int(row.row_id) for row in plan("data", 20, 4).cursor.next(4)][:failing]
    sampler = ScriptedSampler(fails=lambda number, call: number in chosen)
    made = make(tmp_path / "run", [plan("data", 20, 4)], sampler, max_steps=1, max_dropped_fraction=limit)
    if not fails:
        await made.loop.run()
        assert made.metrics[0]["dropped_fraction"] == failing / 4
        return
    with pytest.raises(NoSignalError) as raised:
        await made.loop.run()
    for part in ("step 1", f"{failing} of 4 episodes", f"{failing} by sampler", "out of memory", str(limit)):
        assert part in str(raised.value)
    assert made.learner.calls == [] and made.metrics == [] and made.loop.step == 0


@pytest.mark.anyio
async def test_a_step_with_nothing_to_train_on_fails_whatever_is_allowed(tmp_path: Path):
    sampler = ScriptedSampler(fails=lambda number, call: True)
    made = make(tmp_path / "run", sampler=sampler, max_dropped_fraction=1.0)
    with pytest.raises(NoSignalError):
        await made.loop.run()
    assert made.learner.calls == []


# --- checkpoints


@pytest.mark.anyio
async def test_a_checkpoint_holds_the_rows_used_by_finished_steps_only(tmp_path: Path):
    whole = make(tmp_path / "whole", max_steps=4)
    await whole.loop.run()

    naps = [0]
    stopped = make(
        tmp_path / "stopped", sampler=ScriptedSampler(naps=lambda number: naps[0]), max_steps=4, save_every=2
    )
    async with anyio.create_task_group() as tasks:
        await stopped.loop.sampler.update_weights(stopped.loop.learner.weights(), 0)

        async def train() -> None:
            for _ in range(2):
                await stopped.loop.train_step()
            naps[0] = 1000  # the third step hangs in sampling
            await stopped.loop.train_step()

        tasks.start_soon(train)
        while len(stopped.sampler.seeds) < 6 and stopped.loop.step < 2:
            await anyio.sleep(0.01)
        await anyio.sleep(0.05)
        tasks.cancel_scope.cancel()
    assert stopped.loop.step == 2
    folder = stopped.loop.save()
    stopped.loop.run_dir.close()

    resumed = make(tmp_path / "stopped", max_steps=4)
    resumed.loop.restore(folder)
    await resumed.loop.run()
    assert stopped.learner.calls + resumed.learner.calls == whole.learner.calls
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3, 4]


@pytest.mark.anyio
async def test_checkpoints_are_saved_when_due_and_at_the_end(tmp_path: Path):
    made = make(tmp_path / "run", max_steps=5, save_every=2, keep_checkpoints=2)
    await made.loop.run()
    assert [folder.name for _, folder in made.loop.run_dir.checkpoints()] == ["step_000004", "step_000005"]
    complete = [json.loads((f / "trainer_state/complete.json").read_text()) for _, f in made.loop.run_dir.checkpoints()]
    assert complete == [{"step": 4, "final": False}, {"step": 5, "final": True}]


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', '{"cursors": []}', '{"step": 1, "cursors": []}'])
async def test_a_damaged_state_is_said_to_be_damaged(text: str, tmp_path: Path):
    made = make(tmp_path / "run", max_steps=1)
    await made.loop.run()
    (_, folder) = made.loop.run_dir.checkpoints()[0]
    (folder / "trainer_state" / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="trainer_state cannot be read"):
        made.loop.restore(folder)


@pytest.mark.anyio
async def test_other_rows_than_those_that_were_drawn_are_refused(tmp_path: Path):
    made = make(tmp_path / "run", max_steps=1)
    await made.loop.run()
    made.loop.run_dir.close()
    (_, folder) = made.loop.run_dir.checkpoints()[0]
    for other in (plan("data", 20, 3, rows=7), plan("data", 21, 3)):
        changed = make(tmp_path / "run", [other], max_steps=2)
        with pytest.raises(DataError, match="the data must be the same"):
            changed.loop.restore(folder)
        changed.loop.run_dir.close()


@dataclass
class DyingSampler(ScriptedSampler):
    """Cannot take the weights of a step."""

    dies_at: int = 0
    interrupts: bool = False

    async def update_weights(self, source: Any, version: int) -> None:
        if version == self.dies_at:
            if self.interrupts:
                os.kill(os.getpid(), signal.SIGTERM)
                await anyio.sleep(0.05)
            raise ProtegeError("the engine is dead")


@pytest.mark.anyio
@pytest.mark.parametrize(("save_every", "saved"), [(2, [2]), (3, [])])
async def test_a_step_that_was_due_for_a_checkpoint_is_saved_though_its_weights_reached_no_engine(
    save_every: int, saved: list[int], tmp_path: Path
):
    made = make(tmp_path / "run", sampler=DyingSampler(dies_at=2), max_steps=5, save_every=save_every)
    with pytest.raises(ProtegeError, match="the engine is dead"):
        await made.loop.run()
    assert [step for step, _ in made.loop.run_dir.checkpoints()] == saved
    assert [row["step"] for row in made.metrics] == [1, 2], "the step was done"


@pytest.mark.anyio
async def test_a_signal_that_kills_the_engine_too_is_an_interruption_that_saves_the_step(tmp_path: Path):
    made = make(tmp_path / "run", sampler=DyingSampler(dies_at=2, interrupts=True), max_steps=5)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        await made.loop.run()
    assert [step for step, _ in made.loop.run_dir.checkpoints()] == [2]
    assert [row["step"] for row in made.metrics] == [1, 2]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.anyio
async def test_a_checkpoint_that_fails_after_a_signal_is_an_error_and_no_mere_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = make(tmp_path / "run", sampler=DyingSampler(dies_at=2, interrupts=True), max_steps=5)

    def fail(*, final: bool) -> None:
        raise CheckpointError("no space left")

    monkeypatch.setattr(made.loop, "save", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        await made.loop.run()


@pytest.mark.anyio
@pytest.mark.parametrize("interrupted", [False, True])
async def test_half_an_update_is_no_step_to_save(interrupted: bool, tmp_path: Path):
    made = make(tmp_path / "run", max_steps=5, save_every=2, num_substeps=3)
    step, rates = made.learner.step, []

    def fail(rate: float) -> dict[str, float]:
        rates.append(rate)
        if len(rates) == 8:  # the second substep of the third step
            if interrupted:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            raise ProtegeError("no memory")
        return step(rate)

    made.learner.step = fail  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt if interrupted else ProtegeError):
        await made.loop.run()
    assert [step for step, _ in made.loop.run_dir.checkpoints()] == [2], "as it was saved when it was whole"


@pytest.mark.anyio
async def test_a_step_is_saved_though_its_evaluation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = make(tmp_path / "run", max_steps=4, save_every=2, eval_every=2)

    async def fail() -> dict[str, float]:
        if made.loop.step == 2:
            raise NoSignalError("every attempt was dropped")
        return {}

    monkeypatch.setattr(made.loop, "evaluate", fail)
    with pytest.raises(NoSignalError):
        await made.loop.run()
    assert [step for step, _ in made.loop.run_dir.checkpoints()] == [2]
