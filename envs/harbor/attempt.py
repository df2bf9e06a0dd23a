"""One attempt at a task, whoever makes it: its sandbox from first command to removal, step by step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
from anyio.lowlevel import RunVar

from envs.harbor.processes import ROOT, Before, look_before
from envs.harbor.sandboxes import image_of
from envs.harbor.task import Grading, HarborTask, Step, resolve_variables
from envs.harbor.verifier import HOUSEKEEPING_S, Verdict, VerifierError, verify
from envs.harbor.verifier_apart import verify_apart
from errors import SandboxCommandTimeout, SandboxError
from sandbox.types import ExecResult, Sandbox, SandboxConfig, SandboxFactory

CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID")
"""What root needs inside to install packages, change owners and act as another user: published tasks do."""

PIDS = 1024
LONGEST_SOLUTION_S = 3600.0
DEFAULT_CPUS, DEFAULT_MEMORY_MB = 1.0, 2048


@dataclass(frozen=True)
class HarborSettings:
    """What a run decides about every task."""

    command_timeout_s: float = 120.0
    max_output_bytes: int = 16 * 1024  # of each stream of a command, as the student reads it
    network: Literal["task", "none"] = "task"
    runtime: str | None = None  # of every sandbox; None: the engine's own
    agent_timeout_multiplier: float = 1.0
    keep_services: bool = False  # what listens on a TCP port runs during the tests, and could forge their reward
    max_sandboxes: int = 64  # at once, in this process; further attempts wait
    pass_env: Mapping[str, str] = field(default_factory=dict, repr=False)  # variables of the host, by name


_places: RunVar[anyio.CapacityLimiter] = RunVar("harbor_places")  # a limiter is of one event loop


def places(count: int) -> anyio.CapacityLimiter:
    """Where attempts wait for a sandbox. The first to ask says how many there are."""
    try:
        return _places.get()
    except LookupError:
        _places.set(limiter := anyio.CapacityLimiter(count))
        return limiter


class Attempt:
    """A task's sandbox. `open`, then per step `begin_step` and, if it is graded, `grade`; always `close`.

    Raises `SandboxError` and `VerifierError`, which drop the attempt.
    """

    def __init__(
        self, task: HarborTask, image: str, sandboxes: SandboxFactory, settings: HarborSettings, *, graded: bool
    ) -> None:
        self.task = task
        self.settings = settings
        self.graded = graded or any(step.min_reward for step in task.steps[:-1])  # which decides whether it goes on
        self.verdicts: list[Verdict] = []
        self._image, self._sandboxes = image, sandboxes
        self._sandbox: Sandbox | None = None
        self._place: anyio.CapacityLimiter | None = None
        self._before: Before | None = None
        self._workdir = task.workdir
        self._index = -1
        self._deadline = float("inf")

    # --- life

    async def open(self) -> None:
        """Take a place and make the sandbox. Raises `SandboxError`."""
        limiter = places(self.settings.max_sandboxes)
        await limiter.acquire_on_behalf_of(self)
        self._place = limiter
        if self.graded:  # a verifier's image that cannot be built is said before anything is attempted
            for step in self.task.steps:
                if step.grading.apart is not None:
                    await image_of(step.grading.apart, self._sandboxes)
        self._sandbox = await self._sandboxes.create(self._image, self._config())

    async def close(self) -> None:
        """Remove the sandbox, once, and give the place back. Never raises."""
        sandbox, self._sandbox = self._sandbox, None
        place, self._place = self._place, None
        try:
            if sandbox is not None:
                with anyio.CancelScope(shield=True):
                    await sandbox.cleanup()
        finally:
            if place is not None:
                place.release_on_behalf_of(self)

    @property
    def sandbox(self) -> Sandbox:
        if self._sandbox is None:
            raise SandboxError(f"{self.task.task_id}: its sandbox is not there: not made yet, or removed already")
        return self._sandbox

    def _config(self) -> SandboxConfig:
        task = self.task
        network = task.network and self.settings.network == "task"
        steps_s = sum((step.agent_timeout_s or 3600.0) + step.grading.timeout_s for step in task.steps)
        return SandboxConfig(
            network="bridge" if network else "none",
            cpus=task.cpus or DEFAULT_CPUS,
            memory_mb=task.memory_mb or DEFAULT_MEMORY_MB,
            pids=PIDS,
            workdir=task.workdir,
            env=self._resolved(task.env, "environment.env"),
            capabilities=CAPABILITIES,
            runtime=self.settings.runtime,
            lease_s=max(SandboxConfig.lease_s, 2 * steps_s * self.settings.agent_timeout_multiplier),
        )

    def _resolved(self, env: Mapping[str, str], field_name: str) -> dict[str, str]:
        return resolve_variables(env, self.settings.pass_env, f"{self.task.folder}/task.toml: {field_name}")

    # --- steps

    @property
    def step(self) -> Step:
        return self.task.steps[self._index]

    @property
    def seconds_left(self) -> float:
        """Of the agent's time for this step; infinite where the task sets no limit."""
        return self._deadline - time.monotonic()

    async def begin_step(self) -> Step:
        """Make the next step ready and start its clock."""
        self._index += 1
        step = self.step
        if self._index == 0:
            await self._look()
        if step.workdir is not None:
            await self._bring(step)
        limit = float("inf") if step.agent_timeout_s is None else step.agent_timeout_s
        self._deadline = time.monotonic() + limit * self.settings.agent_timeout_multiplier
        return step

    async def _look(self) -> None:
        """What only an untouched sandbox tells: its processes, and where its image works."""
        if self.graded:
            users = [s.agent_user for s in self.task.steps] + [s.grading.user for s in self.task.steps]
            self._before = await look_before(self.sandbox, users, timeout_s=HOUSEKEEPING_S)
        needed = any(step.workdir is not None or step.grading.apart is not None for step in self.task.steps)
        if self._workdir is None and needed:
            self._workdir = (await self._command("pwd", "finding the working folder")).strip()

    async def _bring(self, step: Step) -> None:
        """A step's own files, into the working folder, and its setup.sh."""
        assert step.workdir is not None and self._workdir is not None
        await self.sandbox.close_shells(ROOT)
        await self._upload(step.workdir, self._workdir)
        if (step.workdir / "setup.sh").is_file():
            await self._command("bash ./setup.sh; s=$?; rm -f ./setup.sh; (exit $s)", f"setup.sh of step {step.name}")

    async def _upload(self, folder: Path, target: str) -> None:
        try:
            await self.sandbox.upload_dir(folder, target, user=ROOT)  # the image's user may be none that can
        except OSError as error:  # the agent's doing, perhaps: a file in the way, a full disk
            raise SandboxError(f"{self.task.task_id}: the sandbox did not take {folder}: {error}") from error

    async def _command(self, command: str, doing: str) -> str:
        """Of ours, and in no shell of the agent's."""
        result = await self.sandbox.run_command(
            command, timeout_s=self.settings.command_timeout_s, workdir=self._workdir, user=ROOT
        )
        if result.exit_code != 0:
            said = result.stderr.decode("utf-8", errors="replace").strip()[-500:]
            raise SandboxError(f"{self.task.task_id}: {doing} failed with status {result.exit_code}: {said}")
        return result.stdout.decode("utf-8", errors="replace")

    async def solve(self) -> ExecResult | None:
        """Run the step's own solution, as an agent would act: as its user, in its time. None: out of time."""
        step = self.step
        assert step.solution is not None, "asked for before the attempt begins"
        await self._upload(step.solution, "/solution")
        try:
            return await self.sandbox.run_command(
                "bash /solution/solve.sh",
                timeout_s=min(self.seconds_left, LONGEST_SOLUTION_S),
                user=step.agent_user,
                workdir=self.task.workdir,
                env=self._resolved(self.task.solution_env, "solution.env") or None,
            )
        except SandboxCommandTimeout:
            return None

    async def grade(self) -> Verdict:
        """Run this step's tests. Raises `VerifierError`."""
        step = self.step
        assert self._before is not None, "only a graded attempt looks at its sandbox before the agent does"
        env = self._resolved(step.grading.env, "verifier.env")
        last = step is self.task.steps[-1]
        try:
            if step.grading.apart is not None:
                make = partial(self._sandbox_apart, step.grading, last=last)
                verdict = await verify_apart(
                    self.sandbox, make, step.grading, self._before, env=env, workdir=self._workdir, last=last
                )
            else:
                verdict = await verify(
                    self.sandbox,
                    step.grading,
                    self._before,
                    env=env,
                    workdir=self.task.workdir,
                    last=last,
                    keep_services=self.settings.keep_services,
                )
        except VerifierError as error:
            where = f", step {step.name}" if step.name else ""
            raise VerifierError(f"{self.task.task_id}{where}: {error}") from error
        self.verdicts.append(verdict)
        return verdict

    async def _sandbox_apart(self, grading: Grading, *, last: bool) -> Sandbox:
        place = grading.apart
        assert place is not None
        if last and self._sandbox is not None:  # an attempt has one sandbox at a time, where that is possible
            sandbox, self._sandbox = self._sandbox, None
            await sandbox.cleanup()
        config = SandboxConfig(
            network="bridge" if place.network and self.settings.network == "task" else "none",
            cpus=place.cpus or DEFAULT_CPUS,
            memory_mb=place.memory_mb or DEFAULT_MEMORY_MB,
            pids=PIDS,
            workdir=place.workdir,
            env=self._resolved(place.env, "verifier.environment.env"),
            capabilities=CAPABILITIES,
            runtime=self.settings.runtime,
            lease_s=max(SandboxConfig.lease_s, 2 * grading.timeout_s),
        )
        return await self._sandboxes.create(await image_of(place, self._sandboxes), config)

    @property
    def step_is_graded(self) -> bool:
        return len(self.verdicts) > self._index

    @property
    def has_next(self) -> bool:
        return self._index + 1 < len(self.task.steps)

    @property
    def goes_on(self) -> bool:
        """Whether another step follows: there is one, and the last verdict reached this step's `min_reward`."""
        least = self.step.min_reward or {}
        rewards = {**self.verdicts[-1].rewards, "reward": self.verdicts[-1].reward} if self.verdicts else {}
        return self.has_next and all(rewards.get(key, float("-inf")) >= value for key, value in least.items())

    def reward(self, *, cut_short: bool) -> float:
        """Of the whole attempt: the last step's, or the mean. Steps that a `min_reward` kept from being
        attempted do not count; those that the attempt did not get to (`cut_short`) count 0."""
        if not self.verdicts:
            return 0.0
        if self.task.reward_strategy == "final":
            return 0.0 if cut_short and len(self.verdicts) < len(self.task.steps) else self.verdicts[-1].reward
        count = len(self.task.steps) if cut_short else len(self.verdicts)
        return sum(verdict.reward for verdict in self.verdicts) / count
