"""Grading, against a sandbox that does what it is told: the order of things, and what counts as a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted_sandbox import REWARD, Call, ScriptedSandbox, result

from envs.harbor.processes import ROOT, Before
from envs.harbor.task import Grading
from envs.harbor.verifier import Verdict, VerifierError, parse_json, parse_text, verify
from errors import SandboxCommandTimeout, SandboxError
from sandbox.types import ExecResult

pytestmark = pytest.mark.anyio


@pytest.fixture
def tests_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test.sh").write_text("#!/bin/bash\n")
    return folder


async def graded(
    sandbox: ScriptedSandbox, folder: Path, *, last: bool = True, keep_services: bool = False, **options: Any
) -> Verdict:
    grading = Grading((folder,), **{"timeout_s": 70.0, "env": {}, "user": None, **options})
    before = Before("1:7", {None: "0:0", "grader": "12:13"})
    return await verify(
        sandbox, grading, before, env={"KEY": "value"}, workdir="/app", last=last, keep_services=keep_services
    )


async def test_tests_are_uploaded_over_nothing_and_run_after_everything_was_ended(tests_folder: Path):
    sandbox = ScriptedSandbox(files={"/tests/test.sh": b"forged", "/tests/conftest.py": b"forged", REWARD: b"1"})

    def tests(sandbox: ScriptedSandbox, call: Call) -> ExecResult:
        assert sandbox.files == {"/tests/test.sh": b"#!/bin/bash\n"}
        assert (call.user, call.timeout_s, call.env, call.workdir) == ("12:13", 70.0, {"KEY": "value"}, "/app")
        assert "> /logs/verifier/test-stdout.txt 2>&1" in call.command
        return sandbox.rewarded("0.5")

    sandbox.tests = tests
    verdict = await graded(sandbox, tests_folder, user="grader")
    assert (verdict.reward, verdict.rewards, verdict.overruled) == (0.5, {"reward": 0.5}, False)
    assert sandbox.events == [
        "ended",
        "wiped",
        "uploaded tests to /tests",
        "tests as 12:13",
        "ended",
        f"read {REWARD}",
    ]
    assert {call.user for call in sandbox.calls if "test.sh >" not in call.command} <= {ROOT, "12:13"}


async def test_a_reward_that_the_agent_left_does_not_count(tests_folder: Path):
    sandbox = ScriptedSandbox(files={REWARD: b"1", "/logs/verifier/reward.json": b'{"reward": 1}'})
    sandbox.tests = lambda sandbox, call: result(exit_code=0)
    with pytest.raises(VerifierError, match=r"wrote neither reward\.json nor reward\.txt"):
        await graded(sandbox, tests_folder)


@pytest.mark.parametrize(
    ("files", "exit_code", "reward", "overruled"),
    [
        ({"reward.txt": "1"}, 0, 1.0, False),
        ({"reward.txt": " 0.25\n"}, 0, 0.25, False),
        ({"reward.txt": "0"}, 1, 0.0, False),  # test scripts often end with a failure after writing 0
        ({"reward.txt": "1"}, 1, 0.0, True),
        ({"reward.txt": "-0.5"}, 1, -0.5, False),
        ({"reward.txt": "1", "reward.json": '{"reward": 0.5}'}, 0, 0.5, False),
        ({"reward.json": '{"score": 0.75}'}, 0, 0.75, False),
        ({"reward.json": '{"a": 1, "b": 0, "c": true}'}, 0, 2 / 3, False),
        ({"reward.json": '{"a": 1, "reward": 0}'}, 1, 0.0, False),
        ({"reward.json": '{"a": 1, "b": 0}'}, 137, 0.0, True),
    ],
)
async def test_what_counts(tests_folder: Path, files: dict[str, str], exit_code: int, reward: float, overruled: bool):
    def tests(sandbox: ScriptedSandbox, call: Call) -> ExecResult:
        for name, text in files.items():
            sandbox.rewarded(text, name=name)
        return result(exit_code=exit_code)

    verdict = await graded(ScriptedSandbox(tests=tests), tests_folder)
    assert (verdict.reward, verdict.overruled, verdict.exit_code) == (pytest.approx(reward), overruled, exit_code)
    assert verdict.metrics()["verifier_overruled"] == overruled


async def test_tests_that_do_not_end_are_an_error_and_no_reward(tests_folder: Path):
    def tests(sandbox: ScriptedSandbox, call: Call) -> ExecResult:
        sandbox.rewarded("1")
        raise SandboxCommandTimeout("over")

    with pytest.raises(VerifierError, match=r"verifier\.timeout_sec=70 s") as error:
        await graded(ScriptedSandbox(tests=tests), tests_folder)
    assert error.value.reason == "verifier"


async def test_a_sandbox_that_dies_is_an_error_and_no_reward(tests_folder: Path):
    def tests(sandbox: ScriptedSandbox, call: Call) -> ExecResult:
        raise SandboxError("its container has ended")

    with pytest.raises(VerifierError, match="its container has ended"):
        await graded(ScriptedSandbox(tests=tests), tests_folder)


@pytest.mark.parametrize(("keep", "first"), [(True, "stopped, but 77"), (False, "ended")])
async def test_what_listens_goes_on_until_the_tests_have_ended_if_the_user_says_so(
    tests_folder: Path, keep: bool, first: str
):
    sandbox = ScriptedSandbox(services="77 ")
    metrics = (await graded(sandbox, tests_folder, keep_services=keep)).metrics()
    assert (metrics["services"], metrics["services_kept"]) == (1, keep)
    order = [event for event in sandbox.events if event.startswith(("stopped", "ended", "tests"))]
    assert order == [first, "tests as 0:0", "ended"]


async def test_between_steps_the_tests_go_away_and_what_ran_goes_on(tests_folder: Path):
    sandbox = ScriptedSandbox(leftovers="31 32")
    verdict = await graded(sandbox, tests_folder, last=False)
    assert verdict.reward == 1.0 and "ended" not in sandbox.events
    assert sandbox.events[-3:] == ["wiped", "new shells", "kill -CONT 31 32 31 32"]
    assert not any(path.startswith(("/tests", "/logs/verifier")) for path in sandbox.files)


@pytest.mark.parametrize("text", ["", "yes", "nan", "inf", "1 2", "1,0"])
def test_reward_txt_holds_one_finite_number(text: str):
    with pytest.raises(VerifierError, match=r"reward\.txt: expected one finite number"):
        parse_text(text.encode())


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", "1", '{"a": "1"}', '{"a": {"b": 1}}', '{"a": NaN}', '{"a": null}', f'{{"a": {10**400}}}']
)
def test_reward_json_is_flat_and_finite(text: str):
    with pytest.raises(VerifierError, match=r"reward\.json"):
        parse_json(text.encode())
