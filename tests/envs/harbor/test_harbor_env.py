"""Harbor tasks as episodes: what the student reads and writes, what is graded, and that nothing stays behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import pytest
from scripted import ScriptedStudent, renderer_of
from scripted_sandbox import Call, ScriptedSandbox, ScriptedSandboxes, result
from test_harbor_task import make_task

from envs.harbor import attempt
from envs.harbor.attempt import HarborSettings
from envs.harbor.env import TOOL_SCHEMA, HarborEnvGroupBuilder
from envs.harbor.sandboxes import DockerSandboxes
from envs.harbor.task import HarborTask, load_task
from envs.rollout import run_group
from envs.types import EpisodeGroup, Sampled, SamplingParams, StopReason
from errors import ImageBuildError, SandboxCommandTimeout, SandboxError
from sandbox.types import ExecResult

pytestmark = pytest.mark.anyio
RENDERER = renderer_of("hermes")


def bash(command: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'bash', 'arguments': {'command': command}})}\n</tool_call>"


@pytest.fixture
def task(tmp_path: Path) -> HarborTask:
    return load_task(
        make_task(tmp_path / "some-task", "[environment]\nallow_internet = false\ncpus = 2\nenv = {A = 'b'}")
    )


def builder(task: HarborTask, sandboxes: ScriptedSandboxes, **options: Any) -> HarborEnvGroupBuilder:
    given = {
        "settings": HarborSettings(), "group_size": 1, "max_turns": 5, "max_tokens": 200,
        "max_trajectory_tokens": 2000, **options,
    }  # fmt: skip
    return HarborEnvGroupBuilder("some-dataset", "some-teacher", task, RENDERER, sandboxes, **given)


class EachSays:
    """Every attempt says these texts, one a turn: which turn it is, is seen by what is sent."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sampled:
        turn = RENDERER.tokenizer.decode(prompt_ids).count("<|im_start|>assistant") - 1
        return await ScriptedStudent(RENDERER, self.texts[turn]).sample(prompt_ids, params)


async def run(group: HarborEnvGroupBuilder, student: Any) -> EpisodeGroup:
    return await run_group(group, student, temperature=1.0, seed=0)


async def test_an_episode_is_what_the_student_was_sent_and_what_it_said(task: HarborTask):
    sandboxes = ScriptedSandboxes([{"agent": lambda sandbox, call: result(f"ran {call.command}\n")}])
    student = ScriptedStudent(RENDERER, "I look. " + bash("ls -l"), bash("cat 'a b' | wc"), "Done.")
    (episode,) = (await run(builder(task, sandboxes), student)).episodes
    ids = episode.token_ids.tolist()
    for sent, said, turn in zip(student.sent, student.said, episode.turns, strict=True):
        assert ids[: turn.start] == sent and ids[turn.start : turn.end] == said
    assert len(ids) == len(student.sent[-1]) + len(student.said[-1])
    assert episode.num_sampled == sum(map(len, student.said)) == int(episode.sampled.sum())
    assert (np.isnan(episode.sampler_logprobs) == ~episode.sampled).all()
    assert [m["content"] for t in episode.turns for m in t.observation] == ["ran ls -l", "ran cat 'a b' | wc"]
    assert episode.prompt_messages == ({"role": "user", "content": "Do it.\n"},)
    assert student.sent[0] == RENDERER.prompt(episode.prompt_messages, [TOOL_SCHEMA])
    assert (episode.dataset, episode.row_id, episode.teacher) == ("some-dataset", "some-task", "some-teacher")
    assert episode.stop_reason is StopReason.COMPLETED and episode.metrics["commands"] == 2


async def test_in_distillation_nothing_is_graded_and_the_reward_is_zero(task: HarborTask):
    sandboxes = ScriptedSandboxes()
    (episode,) = (await run(builder(task, sandboxes), ScriptedStudent(RENDERER, bash("true"), "Done."))).episodes
    (sandbox,) = sandboxes.made
    assert episode.reward == 0.0 and sandbox.events == ["true"] and sandbox.removed


async def test_in_evaluation_the_tests_give_the_reward(task: HarborTask):
    sandboxes = ScriptedSandboxes([{"tests": lambda sandbox, call: sandbox.rewarded("0.5")}])
    group = builder(task, sandboxes, rewarded=True)
    (episode,) = (await run(group, ScriptedStudent(RENDERER, bash("true"), "Done."))).episodes
    assert (episode.reward, episode.metrics["verifier_overruled"]) == (0.5, 0.0)
    assert sandboxes.made[0].events.index("true") < sandboxes.made[0].events.index("tests as 0:0")


@pytest.mark.parametrize(
    ("options", "texts", "reason"),
    [
        ({"max_turns": 1}, [bash("true")], StopReason.MAX_TURNS),
        ({"max_tokens": 5}, [bash("true")], StopReason.MAX_TOKENS),
        ({"max_trajectory_tokens": 450}, [bash("true")] * 9, StopReason.CONTEXT_OVERFLOW),
    ],
)
async def test_an_attempt_that_is_cut_short_is_graded_too(
    task: HarborTask, options: dict[str, int], texts: list[str], reason: StopReason
):
    sandboxes = ScriptedSandboxes()
    group = builder(task, sandboxes, rewarded=True, **options)
    (episode,) = (await run(group, ScriptedStudent(RENDERER, *texts))).episodes
    assert (episode.stop_reason, episode.reward, sandboxes.made[0].removed) == (reason, 1.0, True)


async def test_a_sandbox_is_made_as_the_task_says(tmp_path: Path):
    toml = (
        "[environment]\ncpus = 3\nmemory = '1G'\nworkdir = '/w'\nenv = {KEY = '${KEY}', N = '${N:-5}'}\n"
        "[agent]\nuser = 'agent'\ntimeout_sec = 50000"
    )
    task = load_task(make_task(tmp_path, toml))
    for network, expected in (("task", "bridge"), ("none", "none")):
        sandboxes = ScriptedSandboxes()
        passed = {"KEY": "k", "OTHER": "o"}
        settings = HarborSettings(network=network, runtime="runsc", command_timeout_s=9.0, pass_env=passed)
        group = builder(task, sandboxes, settings=settings)
        await run(group, ScriptedStudent(RENDERER, bash("true"), "Done."))
        (sandbox,) = sandboxes.made
        config = sandbox.config
        assert (config.network, config.cpus, config.memory_mb, config.workdir) == (expected, 3.0, 1024, "/w")
        assert config.env == {"KEY": "k", "N": "5"} and config.lease_s > 50000 and config.runtime == "runsc"
        assert [(c.user, c.timeout_s) for c in sandbox.calls] == [("agent", 9.0)]
        assert "OTHER" not in repr(settings)


async def test_a_prebuilt_image_is_used_and_a_dockerfile_is_built_once_per_group(tmp_path: Path, task: HarborTask):
    sandboxes = ScriptedSandboxes()
    await run(builder(task, sandboxes, group_size=3), EachSays("Done."))
    assert sandboxes.built == [task.context]
    assert [s.image for s in sandboxes.made] == ["built:some-task"] * 3
    prebuilt = load_task(make_task(tmp_path / "p", "[environment]\ndocker_image = 'x/y:1'", dockerfile=None))
    await run(builder(prebuilt, sandboxes), ScriptedStudent(RENDERER, "Done."))
    assert sandboxes.made[-1].image == "x/y:1" and len(sandboxes.built) == 1


# --- failures of ours


def dies(sandbox: ScriptedSandbox, call: Call) -> ExecResult:
    sandbox.removed = True
    raise SandboxError("its container has ended")


async def test_a_container_that_dies_under_a_command_drops_that_attempt_alone(task: HarborTask):
    sandboxes = ScriptedSandboxes([{}, {"agent": dies}, {}])
    group = builder(task, sandboxes, group_size=3, rewarded=True)
    done = await run(group, EachSays(bash("x"), "Done."))
    assert [e.reward for e in done.episodes] == [1.0, 1.0]
    assert (done.dropped, done.causes) == (("sandbox",), ("its container has ended",))
    assert all(sandbox.removed for sandbox in sandboxes.made)


async def test_tests_that_cannot_give_a_reward_drop_the_attempt_and_are_not_zero(task: HarborTask):
    sandboxes = ScriptedSandboxes([{"tests": lambda sandbox, call: result(exit_code=127)}, {"tests": dies}, {}])
    done = await run(builder(task, sandboxes, group_size=3, rewarded=True), EachSays("Done."))
    assert [e.reward for e in done.episodes] == [1.0]
    assert done.dropped == ("verifier", "verifier") and "some-task" in done.causes[0]


async def test_a_sandbox_that_cannot_be_made_drops_its_attempt_alone(task: HarborTask):
    sandboxes = ScriptedSandboxes([SandboxError("no room"), {}])
    done = await run(builder(task, sandboxes, group_size=2), EachSays("Done."))
    assert (len(done.episodes), done.dropped, done.causes) == (1, ("sandbox",), ("no room",))


async def test_an_image_that_cannot_be_built_drops_the_group(task: HarborTask):
    sandboxes = ScriptedSandboxes(build_fails=ImageBuildError("step 2"))
    done = await run(builder(task, sandboxes, group_size=2), ScriptedStudent(RENDERER))
    assert (done.episodes, done.dropped) == ((), ("image", "image"))


async def test_a_cancelled_attempt_leaves_no_sandbox(task: HarborTask):
    class Hanging(ScriptedStudent):
        async def sample(self, prompt_ids: Any, params: SamplingParams):
            await anyio.sleep_forever()

    sandboxes = ScriptedSandboxes()
    with anyio.move_on_after(0.1):
        await run(builder(task, sandboxes, group_size=2), Hanging(RENDERER))
    assert len(sandboxes.made) == 2 and all(sandbox.removed for sandbox in sandboxes.made)


async def test_a_command_that_runs_out_of_time_is_told_to_the_student(task: HarborTask):
    def slow(sandbox: ScriptedSandbox, call: Call) -> ExecResult:
        raise SandboxCommandTimeout("over")

    sandboxes = ScriptedSandboxes([{"agent": slow}])
    (episode,) = (await run(builder(task, sandboxes), ScriptedStudent(RENDERER, bash("x"), "Done."))).episodes
    assert episode.turns[0].observation[0]["content"].startswith("[killed after 120 s")
    assert episode.metrics["command_timeouts"] == 1


async def test_the_agents_time_ends_the_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(attempt, "time", SimpleNamespace(monotonic=lambda: now))

    def slow(sandbox: ScriptedSandbox, call: Call) -> ExecResult:
        nonlocal now
        assert call.timeout_s == 1.0  # no more than is left, but at least a second
        now += 0.15
        return result("slow")

    task = load_task(make_task(tmp_path, "[agent]\ntimeout_sec = 0.2"))
    sandboxes = ScriptedSandboxes([{"agent": slow}])
    student = ScriptedStudent(RENDERER, *[bash("x")] * 5)
    (episode,) = (await run(builder(task, sandboxes, rewarded=True), student)).episodes
    assert (episode.stop_reason, len(episode.turns), episode.reward) == (StopReason.TIMEOUT, 2, 1.0)


# --- several steps


@pytest.fixture
def two_steps(tmp_path: Path) -> Callable[..., HarborTask]:
    def make(toml: str = "", second: str = "") -> HarborTask:
        files: dict[str, Any] = {
            "steps/one/instruction.md": "First.",
            "steps/two/instruction.md": "Then.",
            "steps/two/workdir/data.txt": "d",
        }
        return load_task(
            make_task(tmp_path / "two", f"{toml}\n[[steps]]\nname = 'one'\n{second}\n[[steps]]\nname = 'two'", **files)
        )

    return make


def rewards_of(*texts: str) -> Callable[[ScriptedSandbox, Call], ExecResult]:
    queue = list(texts)
    return lambda sandbox, call: sandbox.rewarded(queue.pop(0))


async def test_the_next_instruction_follows_an_answer_without_a_call(two_steps: Callable[..., HarborTask]):
    sandboxes = ScriptedSandboxes([{"agent": lambda sandbox, call: result("/app" if call.command == "pwd" else "ok")}])
    student = ScriptedStudent(RENDERER, bash("a"), "One is done.", bash("b"), "All is done.")
    (episode,) = (await run(builder(two_steps(), sandboxes), student)).episodes
    assert [m["content"] for t in episode.turns for m in t.observation] == ["ok", "Then.", "ok"]
    assert episode.turns[1].observation[0]["role"] == "user"
    assert episode.token_ids.tolist() == student.sent[-1] + student.said[-1]
    assert (episode.stop_reason, episode.reward) == (StopReason.COMPLETED, 0.0)
    (sandbox,) = sandboxes.made  # the folder is found before the agent can `cd` away, and in no shell of its own
    assert sandbox.events == ["pwd", "a", "new shells", "uploaded workdir to /app", "b"]
    assert {call.command: call.user for call in sandbox.calls} == {"pwd": "0:0", "a": None, "b": None}


async def test_files_that_the_sandbox_does_not_take_drop_the_attempt_alone(two_steps: Callable[..., HarborTask]):
    sandboxes = ScriptedSandboxes([{"refuses": FileExistsError(17, "File exists")}, {}])
    done = await run(builder(two_steps(), sandboxes, group_size=2), EachSays("One.", "Two."))
    assert (len(done.episodes), done.dropped) == (1, ("sandbox",)) and "File exists" in done.causes[0]


@pytest.mark.parametrize(
    ("toml", "second", "rewards", "reward", "turns"),
    [
        ("", "", ["1", "0.5"], 0.75, 2),
        ("multi_step_reward_strategy = 'final'", "", ["1", "0.5"], 0.5, 2),
        ("", "min_reward = 0.5", ["0.5", "1"], 0.75, 2),
        ("", "min_reward = 0.5", ["0.25"], 0.25, 1),
        ("", "min_reward = {other = 0.5}", ["1"], 1.0, 1),
    ],
)
async def test_rewards_of_steps(
    two_steps: Callable[..., HarborTask], toml: str, second: str, rewards: list[str], reward: float, turns: int
):
    sandboxes = ScriptedSandboxes([{"tests": rewards_of(*rewards)}])
    student = ScriptedStudent(RENDERER, "One.", "Two.")
    group = builder(two_steps(toml, second), sandboxes, rewarded=True)
    (episode,) = (await run(group, student)).episodes
    assert (episode.reward, len(episode.turns)) == (reward, turns)


async def test_a_step_that_was_not_reached_counts_zero(two_steps: Callable[..., HarborTask]):
    sandboxes = ScriptedSandboxes([{"tests": rewards_of("1")}])
    group = builder(two_steps(), sandboxes, rewarded=True, max_turns=1)
    (episode,) = (await run(group, ScriptedStudent(RENDERER, bash("x")))).episodes
    assert (episode.reward, episode.stop_reason) == (0.5, StopReason.MAX_TURNS)


async def test_a_least_reward_is_graded_in_distillation_too(two_steps: Callable[..., HarborTask]):
    sandboxes = ScriptedSandboxes([{"tests": rewards_of("0")}])
    group = builder(two_steps("", "min_reward = 1"), sandboxes)
    (episode,) = (await run(group, ScriptedStudent(RENDERER, "One."))).episodes
    assert (episode.reward, len(episode.turns)) == (0.0, 1)


# --- the rest


def test_a_builder_pickles(task: HarborTask):
    group = replace(builder(task, ScriptedSandboxes()), sandboxes=DockerSandboxes("run"), renderer=None)  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(group)) == group
