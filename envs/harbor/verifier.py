"""Grading a step of a Harbor task: its own tests, in the agent's sandbox, after the agent has ended.

The tests are uploaded only now, over nothing that the agent left; what it left running is ended first
(`envs/harbor/processes.py`), and the tests run in a shell that was not there while the agent's processes ran.

A reward above 0 counts only if `test.sh` also ended with status 0. What keeps us from knowing a reward
(no reward file, one that cannot be read, tests that do not end, a sandbox that dies) is a `VerifierError`:
the episode is dropped, never scored 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from envs.harbor import processes
from envs.harbor.processes import ROOT, Before
from envs.harbor.task import Grading
from errors import InfrastructureError, SandboxCommandTimeout, SandboxError
from sandbox.types import ExecResult, Sandbox

FOLDER = "/logs/verifier"
HOUSEKEEPING_S = 60.0
_MAX_REWARD_BYTES = 64 * 1024
LAST_OUTPUT = 2000
_LARGEST = 1e300  # beyond it, Python's integers are no floats


class VerifierError(InfrastructureError):
    """A reward could not be found out."""

    reason = "verifier"


@dataclass(frozen=True)
class Verdict:
    """A step's reward: of its key `reward`, of its only key, or else the mean over its keys."""

    reward: float
    rewards: Mapping[str, float]
    exit_code: int
    overruled: bool  # the file said more than 0, but test.sh failed
    services: int  # processes of the agent that listened
    services_kept: bool  # and whether they ran during the tests: then they could write the reward
    duration_s: float
    output: str  # the end of what the tests printed
    left_out: int = 0  # what the agent left in its artifacts and a verifier apart could not be given

    def metrics(self) -> dict[str, float]:
        return {
            "verifier_s": self.duration_s,
            "verifier_overruled": float(self.overruled),
            "services": float(self.services),
            "services_kept": float(self.services * self.services_kept),
            "artifacts_left_out": float(self.left_out),
        } | {f"reward/{key}": value for key, value in self.rewards.items() if key != "reward"}


async def verify(
    sandbox: Sandbox,
    grading: Grading,
    before: Before,
    *,
    env: Mapping[str, str],
    workdir: str | None,
    last: bool,
    keep_services: bool,
) -> Verdict:
    """Grade what the agent did. `env` is the resolved environment of the tests; unless `last`, what the
    agent left running goes on afterwards; with `keep_services`, what listens runs during the tests, too.
    Raises `VerifierError`."""
    try:
        services = await _listeners(sandbox, before, needed=keep_services)
        stopped = await quieten(sandbox, before, services if keep_services else [], last=last)
        await upload_tests(sandbox, grading, before)
        result = await run_tests(sandbox, grading, before, env=env, workdir=workdir)
        stopped += await quieten(sandbox, before, [], last=last)
        rewards = await read_rewards(sandbox)
        output = await output_of(sandbox)
        if not last:
            await checked(sandbox, f"rm -rf /tests {FOLDER}", "clearing away the tests")
            await sandbox.close_shells(ROOT, *before.numbers.values())
            await processes.resume(sandbox, stopped, timeout_s=HOUSEKEEPING_S)
    except SandboxError as error:
        raise VerifierError(f"the verifier's sandbox failed: {error}") from error
    except OSError as error:
        raise VerifierError(f"the sandbox did not take the tests: {error}") from error
    return verdict_of(result, rewards, output, services=len(services), services_kept=keep_services)


async def _listeners(sandbox: Sandbox, before: Before, *, needed: bool) -> list[str]:
    """An agent can leave so much running that nothing else starts. That costs it its services, not us the grade."""
    try:
        return await processes.listeners(sandbox, before, timeout_s=HOUSEKEEPING_S)
    except SandboxError:
        if needed:
            raise
        return []


def verdict_of(
    result: ExecResult,
    rewards: Mapping[str, float] | None,
    output: str,
    *,
    services: int,
    services_kept: bool,
    left_out: int = 0,
) -> Verdict:
    """What the tests' status and their reward file mean together. Raises `VerifierError` without a reward."""
    if rewards is None:
        raise VerifierError(
            f"test.sh ended with status {result.exit_code} and wrote neither reward.json nor reward.txt. "
            f"Its output ended: {output[-LAST_OUTPUT:].strip() or '(nothing)'}"
        )
    reward = rewards["reward"] if "reward" in rewards else sum(rewards.values()) / len(rewards)
    overruled = reward > 0 and result.exit_code != 0
    return Verdict(
        reward=0.0 if overruled else reward,
        rewards=rewards,
        exit_code=result.exit_code,
        overruled=overruled,
        services=services,
        services_kept=services_kept,
        duration_s=result.duration_s,
        output=output[-LAST_OUTPUT:],
        left_out=left_out,
    )


async def quieten(sandbox: Sandbox, before: Before, services: Sequence[str], *, last: bool) -> list[str]:
    """Nothing of the agent's runs any longer, but for `services`, and no shell is open that it could have written
    into. Returns what is to go on, if not the `last`."""
    if last and not services:
        await sandbox.end_processes()
        return []
    await sandbox.close_shells(ROOT, *before.numbers.values())
    stopped = await processes.stop(sandbox, before, services, timeout_s=HOUSEKEEPING_S)
    return [] if last else stopped


def make_logs(owner: str) -> str:
    """A script that makes the verifier's folder anew. A link or a file of the agent's may be in the way."""
    ways = "/logs /logs/agent /logs/artifacts"
    clear = f"for way in {ways}; do [ -d $way ] || rm -rf $way; done"
    return f"rm -rf {FOLDER} && {clear} && mkdir -p {ways} {FOLDER} && chown {owner} {FOLDER}"


async def upload_tests(sandbox: Sandbox, grading: Grading, before: Before) -> None:
    make = f"rm -rf /tests && {make_logs(before.numbers[grading.user])} && mkdir -p /tests"
    await checked(sandbox, make, "clearing the way for the tests")
    for folder in grading.tests:
        await sandbox.upload_dir(folder, "/tests", user=ROOT)
    await checked(sandbox, "chmod a+rx /tests /tests/test.sh", "uploading the tests")


async def run_tests(
    sandbox: Sandbox, grading: Grading, before: Before, *, env: Mapping[str, str], workdir: str | None
) -> ExecResult:
    try:
        return await sandbox.run_command(
            f"/tests/test.sh > {FOLDER}/test-stdout.txt 2>&1 < /dev/null",
            timeout_s=grading.timeout_s,
            workdir=workdir,
            env=env or None,
            user=before.numbers[grading.user],
        )
    except SandboxCommandTimeout as error:
        raise VerifierError(f"test.sh did not end within verifier.timeout_sec={grading.timeout_s:g} s") from error


async def checked(sandbox: Sandbox, command: str, doing: str) -> None:
    result = await sandbox.run_command(command, timeout_s=HOUSEKEEPING_S, user=ROOT)
    if result.exit_code != 0:
        said = result.stderr.decode("utf-8", errors="replace").strip()
        raise VerifierError(f"{doing} failed with status {result.exit_code}: {said[-LAST_OUTPUT:]}")


async def output_of(sandbox: Sandbox) -> str:
    """The end of the tests' output: for people, so that nothing hangs on it."""
    result = await sandbox.run_command(
        f"tail -c {4 * LAST_OUTPUT} {FOLDER}/test-stdout.txt 2>/dev/null", timeout_s=HOUSEKEEPING_S, user=ROOT
    )
    return result.stdout.decode("utf-8", errors="replace")


# --- the reward file


async def read_rewards(sandbox: Sandbox) -> dict[str, float] | None:
    """What reward.json says, or else reward.txt; None without either. Raises `VerifierError`."""
    for name, parse in (("reward.json", parse_json), ("reward.txt", parse_text)):
        try:
            content = await sandbox.read_file(f"{FOLDER}/{name}", max_bytes=_MAX_REWARD_BYTES, user=ROOT)
        except FileNotFoundError:
            continue
        except OSError as error:  # a folder, a pipe, larger than any reward
            raise VerifierError(f"{name} cannot be read: {error}") from error
        return parse(content)
    return None


def parse_json(content: bytes) -> dict[str, float]:
    """A flat object of finite numbers. Raises `VerifierError`."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise VerifierError(f"reward.json is not JSON: {error}") from None
    if not isinstance(value, dict) or not value:
        raise VerifierError(f"reward.json: expected an object of numbers, got {str(value)[:100]}")
    rewards = {}
    for key, number in value.items():
        if not isinstance(number, int | float) or not abs(number) < _LARGEST:
            raise VerifierError(f"reward.json: {key!r}: expected a finite number, got {str(number)[:100]}")
        rewards[key] = float(number)
    return rewards


def parse_text(content: bytes) -> dict[str, float]:
    """One finite number. Raises `VerifierError`."""
    text = content.decode("utf-8", errors="replace").strip()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise VerifierError(f"reward.txt: expected one finite number, got {text[:100]!r}")
    return {"reward": number}
