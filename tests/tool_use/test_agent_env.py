"""Episodes with tools: what the student is sent, how they end, what is counted, what they leave behind."""

from __future__ import annotations

import json
import math
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache, partial
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import TEMPLATES, Row, ScriptedStudent, renderer_of, user
from scripted import ScriptedStudent as Student

from envs.rendering import Renderer, control_tokens
from envs.rollout import run_episode, run_group
from envs.types import Episode, Message, StopReason, TeacherHint
from errors import ConfigError, DataError, SandboxError
from models.teacher_view import ViewMaker
from tool_use import AgentLimits, ToolEnvGroupBuilder, ToolResult, build_agent_tool_env, tool, zero_reward
from tool_use.group_builder import opened

pytestmark = pytest.mark.anyio

CUT = ScriptedStudent.CUT
PROMPT = [user("add it up")]


class Calculator:
    def __init__(self, total: int = 0) -> None:
        self.total = total

    @tool(sequential=True)
    def add(self, n: int) -> int:
        """Adds to the total."""
        self.total += n
        return self.total

    @tool
    def done(self, answer: str) -> ToolResult:
        return ToolResult("noted", stop=True, metrics={"answers": 1}, metadata={"answer": answer})


def make_calculator() -> list[Any]:
    calculator = Calculator()
    return [calculator.add, calculator.done]


def echo(text: str) -> Any:
    @tool(name="echo")
    def echo() -> str:
        return text

    return echo


def call_text(format: str, name: str, **arguments: Any) -> str:
    if format == "qwen_xml":
        values = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
        return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"
    written = json.dumps(arguments)
    return {
        "hermes": f'<tool_call>\n{{"name": "{name}", "arguments": {written}}}\n</tool_call>',
        "llama3_json": f'{{"name": "{name}", "parameters": {written}}}',
        "mistral_list": f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {written}, "id": "abcdefgh1"}}]',
        "mistral_named": f"[TOOL_CALLS]{name}[ARGS]{written}",
    }[format]


def add(n: Any) -> str:
    return call_text("hermes", "add", n=n)


HERMES = renderer_of("hermes")


async def episode(
    *texts: str, tools: list[Any] | None = None, renderer: Renderer = HERMES, row: Any = None, **options: Any
) -> tuple[Episode, ScriptedStudent, Any]:
    env = build_agent_tool_env(renderer, make_calculator() if tools is None else tools, PROMPT, **options)
    student = Student(renderer, *texts)
    done = await run_episode(env, student, row or Row(), temperature=1.0, seed=1)
    return done, student, env


def contents(env: Any) -> list[str]:
    return [m["content"] for m in env.message_env.history if m["role"] == "tool"]


# --- the stream


@pytest.mark.parametrize("format", TEMPLATES)
async def test_the_stream_is_what_the_student_was_sent_and_what_it_said_turn_by_turn(format: str):
    renderer = renderer_of(format)
    texts = [call_text(format, "add", n=2), f"Now\n{call_text(format, 'add', n=3)}", "It is 5."]
    done, student, env = await episode(*texts, renderer=renderer)
    stream: list[int] = []
    for sent, said in zip(student.sent, student.said, strict=True):
        assert sent[: len(stream)] == stream  # nothing that was there before has changed
        stream = sent + said
    assert done.token_ids.tolist() == stream
    assert done.token_ids[done.sampled].tolist() == [i for said in student.said for i in said]
    assert done.num_sampled == sum(map(len, student.said))
    assert (np.isnan(done.sampler_logprobs) == ~done.sampled).all()
    assert [turn.end - turn.start for turn in done.turns] == list(map(len, student.said))
    assert done.stop_reason is StopReason.COMPLETED
    assert contents(env) == ["2", "5"]
    schemas = [made.schema for made in make_calculator()]
    assert student.sent[0] == renderer.prompt(PROMPT, schemas)
    assert list(done.tools) == schemas


@pytest.mark.parametrize("format", TEMPLATES)
async def test_the_tokens_of_a_clean_episode_are_the_templates_own(format: str):
    """For benign text, and calls written as the template writes them, appending is rendering."""
    renderer: Any = renderer_of(format)
    messages = [*PROMPT]
    done, student, env = await episode("Fine.", renderer=renderer)
    whole = renderer.prompt([*messages], done.tools)
    assert done.token_ids.tolist()[: len(whole)] == whole
    written = renderer.write_call("add", {"n": 2}, "abcdefgh1").removeprefix(renderer.header)
    said = (
        written[: written.rindex("<|")]
        if format != "hermes"
        else written.partition("</think>\n\n")[2][: -len("<|im_end|>\n")]
    )
    done, student, env = await episode(said, "Fine.", renderer=renderer)
    call = env.message_env.history[1]["tool_calls"]
    history = [user("x"), {"role": "assistant", "content": "", "tool_calls": call}, done.turns[0].observation[0]]
    theirs = renderer.tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    ours = renderer.tokenizer.decode(student.sent[1])
    after_call = ours[ours.rindex(said) + len(said) :]
    assert theirs.endswith(after_call.removeprefix("<|eot_id|>"))


# --- how episodes end


@pytest.mark.parametrize(
    ("texts", "options", "reason", "results"),
    [
        (["5"], {}, StopReason.COMPLETED, []),
        ([add(2), "2"], {}, StopReason.COMPLETED, ["2"]),
        ([call_text("hermes", "done", answer="5")], {}, StopReason.TOOL_STOPPED, ["noted"]),
        ([add(1), add(2), add(3)], {"max_turns": 2}, StopReason.MAX_TURNS, ["1", "3"]),
        (["5", "6"], {"max_turns": 1}, StopReason.COMPLETED, []),
        ([add(1) * 2, add(2) * 2, "x"], {"max_tool_calls": 3}, StopReason.MAX_TOOL_CALLS, ["1", "2", "4"]),
        ([add(1) * 2, "x"], {"max_tool_calls": 2}, StopReason.COMPLETED, ["1", "2"]),
        ([add(1), f"cut {CUT}"], {}, StopReason.MAX_TOKENS, ["1"]),
        ([f"{add(1)}{CUT}"], {}, StopReason.MAX_TOKENS, []),
        (["long " * 50], {"max_generation_tokens": 20}, StopReason.MAX_TOKENS, []),
        (["long " * 5000], {"max_generation_tokens": 9000}, StopReason.CONTEXT_OVERFLOW, []),
        ([add("x"), "sorry"], {}, StopReason.COMPLETED, ["Error: invalid arguments: add: argument 'n'"]),
        ([call_text("hermes", "sub"), "k"], {}, StopReason.COMPLETED, ["Error: there is no tool 'sub'."]),
        (["<tool_call>1</tool_call>", "k"], {}, StopReason.COMPLETED, ["Error: your tool call"]),
        (["<tool_call>add(1)</tool_call>"], {"parse_error_policy": "stop"}, StopReason.PARSE_ERROR, []),
        ([f"{add(1)}<tool_call>"], {"parse_error_policy": "stop"}, StopReason.PARSE_ERROR, []),
        ([f"<tool_call>x</tool_call>{add(1)}", "k"], {}, StopReason.COMPLETED, ["1", "Error: your"]),
        (["<tool_call>", "<tool_call>"], {"max_turns": 2}, StopReason.MAX_TURNS, ["Error: your", "Error: your"]),
    ],
)  # fmt: skip
async def test_how_an_episode_ends(texts: list[str], options: dict[str, Any], reason: StopReason, results: list[str]):
    done, student, env = await episode(*texts, **options)
    assert done.stop_reason is reason
    found = contents(env)
    assert len(found) == len(results) and all(f.startswith(r) for f, r in zip(found, results, strict=True)), found
    assert done.metrics["turns"] == len(done.turns)
    assert done.num_sampled == sum(map(len, student.said)) == done.sampled.sum()


async def test_an_answer_that_leaves_no_room_ends_the_episode_and_is_not_appended():
    done, student, _ = await episode(call_text("hermes", "echo"), tools=[echo("x" * 9000)], max_trajectory_tokens=1000)
    assert done.stop_reason is StopReason.CONTEXT_OVERFLOW
    assert done.token_ids.tolist() == student.sent[0] + student.said[0]
    assert len(done.turns) == 1 and done.turns[0].observation == ()


async def test_no_episode_is_longer_than_its_limit():
    tools, texts = [echo("x" * 10)], [call_text("hermes", "echo"), "y" * 10]
    prompt = len(HERMES.prompt(PROMPT, [tools[0].schema]))
    whole = len((await episode(*texts, tools=tools))[0])
    for limit in range(prompt + 1, whole + 3):
        done, _, _ = await episode(*texts, tools=tools, max_trajectory_tokens=limit)
        assert len(done) <= limit and done.sampled[-1]
        fits = limit >= whole
        assert done.stop_reason is (StopReason.COMPLETED if fits else StopReason.CONTEXT_OVERFLOW)


async def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_sampled():
    with pytest.raises(DataError, match="max_trajectory_tokens=10: the prompt alone has"):
        await episode("x", max_trajectory_tokens=10)


async def test_wall_clock():
    release = threading.Event()

    @tool
    def slow() -> str:
        release.wait(30)
        return "late"

    with anyio.fail_after(10):
        done, _, env = await episode(call_text("hermes", "slow"), "x", tools=[slow], timeout_s=0.1)
    release.set()
    assert (done.stop_reason, contents(env)) == (StopReason.TIMEOUT, [])


@pytest.mark.parametrize(
    "broken", [{"max_turns": 0}, {"max_tool_calls": -1}, {"timeout_s": 0}, {"parse_error_policy": "ask"}]
)
def test_limits_that_make_no_sense_are_refused(broken: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(broken))):
        build_agent_tool_env(HERMES, [], PROMPT, **broken)


async def test_an_environment_without_tools_is_a_single_answer():
    done, student, _ = await episode(add(1), tools=[])
    assert (done.stop_reason, done.tools) == (StopReason.COMPLETED, ())
    assert student.sent == [HERMES.prompt(PROMPT)]


# --- what is counted and rewarded


async def test_everything_is_counted_in_every_episode():
    texts = [add(1) + add("x"), f"{call_text('hermes', 'sub')}<tool_call>", call_text("hermes", "done", answer="1")]
    done, _, _ = await episode(*texts)
    assert {name: value for name, value in done.metrics.items() if value} == {
        "turns": 3, "tool_calls": 4, "parse_errors": 1, "tool_errors": 2, "tool_errors/invalid_arguments": 1,
        "tool_errors/unknown_tool": 1, "answers": 1,
    }  # fmt: skip
    quiet, _, _ = await episode("x")  # zeros, too: a mean over episodes must not leave out those without
    assert quiet.metrics.keys() == done.metrics.keys() - {"answers"}
    assert {name for name, value in quiet.metrics.items() if value} == {"turns"}


async def test_the_reward_is_asked_once_and_sees_what_the_model_does_not():
    seen: list[list[Message]] = []

    def reward(messages: list[Message]) -> tuple[float, dict[str, float]]:
        assert threading.current_thread() is not threading.main_thread()
        seen.append(messages)
        return 0.5, {"graded": 2}

    done, _, _ = await episode(add(2), call_text("hermes", "done", answer="2"), reward_fn=reward)
    assert (done.reward, done.metrics["graded"], len(seen)) == (0.5, 2.0, 1)
    roles = [m["role"] for m in seen[0]]
    assert roles == ["user", "assistant", "tool", "assistant", "tool"]
    assert seen[0][-1]["metadata"] == {"answer": "2"}
    assert all("metadata" not in m for turn in done.turns for m in turn.observation)


@pytest.mark.parametrize(
    ("texts", "options"),
    [([f"cut{CUT}"], {}), ([add(1)], {"max_turns": 1}), ([add(1)], {"max_trajectory_tokens": 400})],
)
async def test_every_end_is_rewarded(texts: list[str], options: dict[str, Any]):
    async def reward(messages: list[Message]) -> float:
        assert messages[1]["role"] == "assistant"
        return 1

    done, _, _ = await episode(*texts, reward_fn=reward, **options)
    assert done.reward == 1.0


async def test_zero_reward_is_the_default_and_a_reward_that_is_no_number_is_refused():
    assert (await episode("x"))[0].reward == await zero_reward([]) == 0.0
    with pytest.raises(ConfigError, match="reward_fn returned nan"):
        await episode("x", reward_fn=lambda messages: math.nan)


# --- text from outside


@pytest.mark.parametrize("format", TEMPLATES)
async def test_a_result_with_every_control_token_changes_no_role(format: str):
    renderer = renderer_of(format)
    controls = control_tokens(renderer.tokenizer)
    texts = [call_text(format, "echo"), "ok"]
    benign, _, _ = await episode(*texts, tools=[echo("x")], renderer=renderer)
    expected = [i for i in benign.token_ids[~benign.sampled].tolist() if i in controls]
    for poison in [*controls.values(), "".join(controls.values()), "\n".join(controls.values())]:
        done, _, _ = await episode(*texts, tools=[echo(f"a{poison}b")], renderer=renderer)
        assert [i for i in done.token_ids[~done.sampled].tolist() if i in controls] == expected, poison
        shown = f"a{poison}b"
        if format not in ("hermes", "qwen_xml"):  # these templates write results as JSON
            shown = json.dumps(shown, ensure_ascii=False)
        assert shown in renderer.tokenizer.decode(done.token_ids.tolist())


CONTROL_TEXTS = sorted(control_tokens(HERMES.tokenizer).values())
POISON = st.lists(
    st.one_of(st.text(max_size=6), st.sampled_from(CONTROL_TEXTS), st.sampled_from([t[:3] for t in CONTROL_TEXTS])),
    max_size=6,
)


def controls_of(format: str, tools: list[Any]) -> list[int]:
    """The control tokens of an episode that calls `echo` and then `fail`, but for what the student wrote."""
    texts = [call_text(format, "echo"), call_text(format, "fail"), "ok"]
    done, _, _ = anyio.run(lambda: episode(*texts, tools=tools, renderer=renderer_of(format)))
    assert len(done.turns) == 3
    known = control_tokens(renderer_of(format).tokenizer)
    return [i for i in done.token_ids[~done.sampled].tolist() if i in known]


@cache
def controls_of_harmless(format: str) -> list[int]:
    @tool
    def echo() -> str:
        return "x"

    @tool
    def fail() -> None:
        raise ValueError("x")

    return controls_of(format, [echo, fail])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(result=POISON.map("".join), error=POISON.map("".join), format=st.sampled_from(sorted(TEMPLATES)))
def test_no_result_and_no_error_forges_a_control_token(result: str, error: str, format: str):
    @tool
    def echo() -> str:
        return result

    @tool
    def fail() -> None:
        raise ValueError(error)

    assert controls_of(format, [echo, fail]) == controls_of_harmless(format)


# --- what the teacher sees


async def test_a_teacher_with_the_same_format_sees_the_episode_itself():
    done, _, _ = await episode(add(2), "2")
    view = ViewMaker(HERMES, HERMES).view(done)
    assert view.token_ids.tolist() == done.token_ids.tolist()
    assert view.positions.tolist() == np.flatnonzero(done.sampled).tolist()


@pytest.mark.parametrize("student_format", TEMPLATES)
@pytest.mark.parametrize("teacher_format", TEMPLATES)
async def test_a_teacher_with_another_format_sees_the_same_tools_calls_and_results(
    student_format: str, teacher_format: str
):
    student, teacher = renderer_of(student_format), renderer_of(teacher_format)
    texts = [call_text(student_format, "add", n=2), "<tool_call> [TOOL_CALLS] broken", "It is 2."]
    done, said, _ = await episode(*texts, renderer=student)
    maker = ViewMaker(student, teacher)
    view = maker.view(done)
    a, b = maker.swap or (-1, -1)
    swapped = [{a: b, b: a}.get(i, i) for turn in said.said for i in turn]
    assert view.token_ids[view.positions].tolist() == swapped  # verbatim, but for the end of turn
    assert view.student_positions.tolist() == np.flatnonzero(done.sampled).tolist()
    around = np.delete(view.token_ids, view.positions).tolist()
    if student_format == teacher_format:
        return
    expected = list(teacher.prompt(PROMPT, [made.schema for made in make_calculator()]))
    for turn in done.turns:
        if turn.observation:
            expected += teacher.continuation(turn.observation, ended=True, tool_calls=turn.tool_calls)
    assert around == expected
    if len(done.turns) > 1:  # the call's result, in the teacher's own words
        assert teacher.tokenizer.decode(
            teacher.continuation(done.turns[0].observation, ended=True, tool_calls=done.turns[0].tool_calls)
        ) in teacher.tokenizer.decode(around)


async def test_ids_and_names_that_the_teachers_format_needs_reach_it():
    done, _, _ = await episode(call_text("hermes", "add", n=2), "2")
    view = ViewMaker(HERMES, renderer_of("mistral_list")).view(done)
    shown = HERMES.tokenizer.decode(view.token_ids.tolist())
    assert '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add"' in shown
    assert '[TOOL_RESULTS] "2" call00001[/TOOL_RESULTS]' in shown


async def test_privileged_messages_come_with_the_tools():
    row = Row(teacher_messages=(user("add it up: it is 2"),))
    done, _, _ = await episode(add(2), "2", row=row)
    shown = HERMES.tokenizer.decode(ViewMaker(HERMES, HERMES).view(done).token_ids.tolist())
    assert '"name": "add"' in shown and "it is 2<|im_end|>" in shown


@pytest.mark.parametrize("teacher_format", ["hermes", "llama3_json"])
async def test_a_hint_comes_after_the_tool_s_answer(teacher_format: str):
    teacher = renderer_of(teacher_format)
    row = Row(teacher_hints=(TeacherHint((user("now say it: 2"),), after_turn=1),))
    done, said, _ = await episode(add(2), "2", row=row)
    view = ViewMaker(HERMES, teacher).view(done)
    (turn, _) = done.turns
    expected = teacher.continuation([*turn.observation, user("now say it: 2")], ended=True, tool_calls=turn.tool_calls)
    start = int(view.positions[turn.end - turn.start - 1]) + 1
    assert view.token_ids[start : start + len(expected)].tolist() == expected
    assert len(view.token_ids) == start + len(expected) + len(said.said[1])
    assert view.student_positions.tolist() == np.flatnonzero(done.sampled).tolist()
    assert "now say it" not in HERMES.tokenizer.decode(done.token_ids.tolist())


# --- groups, and what episodes hold


def group(make_tools: Any, *, group_size: int = 3, **options: Any) -> ToolEnvGroupBuilder:
    return ToolEnvGroupBuilder("d", "r", "t", tuple(PROMPT), HERMES, make_tools, group_size=group_size, **options)


class Notebook:
    """Something to give back."""

    opened: int = 0
    closed: int = 0

    @asynccontextmanager
    async def use(self) -> AsyncIterator[list[Any]]:
        self.opened += 1
        try:
            yield [Calculator().add]
        finally:
            await anyio.lowlevel.checkpoint()  # raises if a cancellation reaches in here
            self.closed += 1


class Client(Notebook):
    """One that keeps a task running, as clients of tool servers do."""

    @asynccontextmanager
    async def use(self) -> AsyncIterator[list[Any]]:
        async with super().use() as tools, anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            yield tools
            tasks.cancel_scope.cancel()


async def test_each_attempt_has_tools_of_its_own():
    student = Student(HERMES, *[add(1)] * 3, *["done"] * 3)
    done = await run_group(group(make_calculator), student, temperature=1.0, seed=1)
    assert [e.turns[0].observation[0]["content"] for e in done.episodes] == ["1", "1", "1"]


async def test_tools_that_outlive_an_episode_keep_their_state():
    calculator = Calculator()
    student = Student(HERMES, *[add(1)] * 3, *["done"] * 3)
    done = await run_group(group(lambda: [calculator.add]), student, temperature=1.0, seed=1)
    assert sorted(e.turns[0].observation[0]["content"] for e in done.episodes) == ["1", "2", "3"]


async def test_what_an_episode_holds_is_given_back_when_it_ends_not_when_its_group_does():
    notebook = Notebook()
    closed_at_turn: list[int] = []

    class Watching(ScriptedStudent):
        async def sample(self, *args: Any) -> Any:
            closed_at_turn.append(notebook.closed)
            if self.texts[0] == "wait":
                while notebook.closed < 1:
                    await anyio.sleep(0.001)
            return await super().sample(*args)

    with anyio.fail_after(10):
        await run_group(group(notebook.use, group_size=2), Watching(HERMES, "done", "wait"), temperature=1.0, seed=1)
    assert (notebook.opened, notebook.closed) == (2, 2)


@pytest.mark.parametrize("held", [Notebook, Client])
@pytest.mark.parametrize("failure", ["infrastructure", "bug", "cancelled", "reward"])
async def test_what_an_episode_holds_is_given_back_however_it_ends(failure: str, held: type[Notebook]):
    notebook = held()

    class Failing(ScriptedStudent):
        async def sample(self, *args: Any) -> Any:
            if failure == "cancelled":
                await anyio.sleep_forever()
            if failure != "reward":
                raise SandboxError("gone") if failure == "infrastructure" else ZeroDivisionError
            return await super().sample(*args)

    def reward(messages: list[Message]) -> float:
        raise SandboxError("no verifier")

    builder = group(notebook.use, reward_fn=reward if failure == "reward" else zero_reward)
    student = Failing(HERMES, *["x"] * 3)
    if failure == "bug":
        with pytest.raises(ExceptionGroup):
            await run_group(builder, student, temperature=1.0, seed=1)
    else:
        with anyio.move_on_after(0.05 if failure == "cancelled" else 10) as scope:
            done = await run_group(builder, student, temperature=1.0, seed=1)
            assert (done.episodes, done.dropped) == ((), ("sandbox",) * 3)
        assert scope.cancelled_caught == (failure == "cancelled")
    assert (notebook.opened, notebook.closed) == (3, 3)


async def test_a_resource_that_cannot_be_had_drops_its_episode_alone():
    turns = iter([True, False, True])

    @asynccontextmanager
    async def make() -> AsyncIterator[list[Any]]:
        if not next(turns):
            raise SandboxError("no room")
        yield make_calculator()

    done = await run_group(group(make), Student(HERMES, "a", "b"), temperature=1.0, seed=1)
    assert (len(done.episodes), done.dropped, done.causes) == (2, ("sandbox",), ("no room",))


async def test_a_broken_sandbox_in_a_tool_drops_the_episode_and_the_model_is_not_told():
    @tool
    def broken() -> None:
        raise SandboxError("gone")

    student = Student(HERMES, *[call_text("hermes", "broken") * 2] * 2)
    done = await run_group(group(lambda: [broken], group_size=2), student, temperature=1.0, seed=1)
    assert (done.episodes, done.dropped) == ((), ("sandbox",) * 2)


async def test_tools_are_made_by_functions_and_contexts_sync_or_async():
    @contextmanager
    def context() -> Iterator[list[Any]]:
        yield make_calculator()

    async def later() -> list[Any]:
        return make_calculator()

    for make in (make_calculator, later, context, partial(list, [Calculator().add])):
        async with opened(make) as tools:
            assert tools[0].name == "add"
    with pytest.raises(ConfigError, match="expected a list of tools, got"):
        async with opened(lambda: Calculator().add):  # type: ignore[arg-type,return-value]
            pass


def test_a_group_builder_can_be_sent_to_another_process():
    limits = AgentLimits(max_turns=3)
    builder = pickle.loads(pickle.dumps(group(make_calculator, limits=limits)))
    assert (builder.limits, builder.make_tools, builder.reward_fn) == (limits, make_calculator, zero_reward)
