"""Grading in a container that the agent has never been in, as a task may ask (`environment_mode = "separate"`).

The task's artifacts, files and folders by name, are all that is carried over, with their modes and times, for the
user that the tests run as; nothing else of what the agent did can reach the tests or the reward. A link goes along
only if it leads to something that does: one to the tests' own files would pass for the agent's work. What cannot go
along is named beside the reward. What the artifacts hold may still be run by the tests, so the rules of
`envs/harbor/verifier.py` for what is left running hold there, too.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from anyio import to_thread

from envs.harbor import processes
from envs.harbor.processes import ROOT, Before, look_before
from envs.harbor.task import Artifact, Grading
from envs.harbor.verifier import (
    HOUSEKEEPING_S,
    Verdict,
    VerifierError,
    checked,
    make_logs,
    output_of,
    quieten,
    read_rewards,
    run_tests,
    upload_tests,
    verdict_of,
)
from errors import DataError, SandboxError
from sandbox.types import Sandbox

PUBLISHED = Artifact("/logs/artifacts")  # always carried over
ARTIFACT_BYTES = 2**30
NAMED = 5  # of what was left out
# Kind, mode and time of a path: a link is what it leads to, and one that leads nowhere is no file.
LOOK = r"""
look() {
  local kind=nothing mode
  if [ -d "$1" ]; then kind=folder; elif [ -f "$1" ]; then kind=file
  elif [ -e "$1" ] || [ -L "$1" ]; then kind=other; fi
  mode=$(stat -L -c '%a %Y' -- "$1" 2>/dev/null) || { [ -x "$1" ] && mode=755 || mode=644; }
  printf '%s %s' "$kind" "$mode"
}
look """
# A folder is emptied and stays the same folder: shells may stand in it.
CLEAR = r"""(
cd {way} 2>/dev/null && [ ! -L {way} ] || {{ rm -rf -- {way}; exit; }}
shopt -s dotglob nullglob
all=(*)
for ((n = 0; n < ${{#all[@]}}; n += 500)); do rm -rf -- "${{all[@]:n:500}}" || exit; done
)"""


@dataclass(frozen=True)
class Carried:
    """One artifact on its way: where it belongs, a local folder (None: it is not there) that is to be unpacked `into`
    another for it, and what of it stays behind."""

    target: str
    local: Path | None
    into: str = ""
    mode: int = 0
    left_out: tuple[str, ...] = ()


async def verify_apart(
    agent: Sandbox,
    make_sandbox: Callable[[], Awaitable[Sandbox]],
    grading: Grading,
    before: Before,
    *,
    env: Mapping[str, str],
    workdir: str | None,
    last: bool,
) -> Verdict:
    """Grade what the agent did, in a sandbox of its own, which is gone afterwards. `make_sandbox` may remove the
    agent's first, if it is the `last` step. `workdir`: where relative artifacts lie, found before the agent acted.
    Raises `VerifierError`."""
    assert grading.apart is not None
    try:
        with tempfile.TemporaryDirectory(prefix="protege-artifacts-") as folder:
            stopped = await quieten(agent, before, [], last=last)
            carried = [
                await _fetch(agent, artifact, workdir, Path(folder, str(number)))
                for number, artifact in enumerate([PUBLISHED, *grading.artifacts])
            ]
            sandbox = await make_sandbox()
            try:
                verdict = await _grade(sandbox, carried, grading, env)
            finally:
                await sandbox.cleanup()
        if not last:
            await agent.close_shells(ROOT, *before.numbers.values())
            await processes.resume(agent, stopped, timeout_s=HOUSEKEEPING_S)
        return verdict
    except SandboxError as error:
        raise VerifierError(f"the verifier's sandbox failed: {error}") from error
    except (OSError, DataError) as error:
        raise VerifierError(f"the artifacts could not be carried over: {error}") from error


async def _fetch(agent: Sandbox, artifact: Artifact, workdir: str | None, local: Path) -> Carried:
    """Where it goes is never the sandbox's word, in which the agent may have replaced every program."""
    target = str(PurePosixPath(workdir or "/", artifact.source))
    said = await agent.run_apart(LOOK + shlex.quote(target), timeout_s=HOUSEKEEPING_S, user=ROOT)
    kind, _, account = said.decode("ascii", "replace").partition(" ")
    found = re.fullmatch("([0-7]{1,4})(?: ([0-9]{1,10}))?", account)
    mode = int(found[1], 8) & 0o777 if found else 0o755
    if kind == "folder":
        left_out = await agent.download_dir(target, local, max_bytes=ARTIFACT_BYTES, user=ROOT)
        await to_thread.run_sync(_exclude, local, artifact.exclude)
        missed = (name for name in left_out if not _is_excluded(PurePosixPath(name), artifact.exclude))
        return Carried(target, local, target, mode, tuple(f"{target}/{name}" for name in missed))
    if kind == "file":
        content = await agent.read_file(target, max_bytes=ARTIFACT_BYTES, user=ROOT)
        local.mkdir()
        await to_thread.run_sync((copy := local / PurePosixPath(target).name).write_bytes, content)
        if found and found[2]:
            os.utime(copy, (int(found[2]), int(found[2])))
        return Carried(target, local, str(PurePosixPath(target).parent), mode)
    return Carried(target, None, left_out=(target,) if kind == "other" else ())


def _exclude(folder: Path, patterns: Sequence[str]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if _is_excluded(PurePosixPath(path.relative_to(folder)), patterns):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_excluded(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    """As tar does, with all that lies below: a pattern is one of a path's ends, from any folder on."""
    for whole in (path, *path.parents):
        ends = ["/".join(whole.parts[n:]) for n in range(len(whole.parts))]
        if any(fnmatch.fnmatch(end, pattern.rstrip("/")) for end in ends for pattern in patterns):
            return True
    return False


async def _grade(sandbox: Sandbox, carried: Sequence[Carried], grading: Grading, env: Mapping[str, str]) -> Verdict:
    assert grading.apart is not None
    before = await look_before(sandbox, [grading.user], timeout_s=HOUSEKEEPING_S)
    owner = before.numbers[grading.user]
    for artifact in carried:  # all, before the first is there: one may lie in another
        clear = CLEAR.format(way=shlex.quote(artifact.target))  # what the agent has not is not there for the tests
        await checked(sandbox, clear, "clearing the way for an artifact")
    for artifact in carried:
        await _place(sandbox, artifact, owner)
    if grading.apart.bundled:
        await checked(sandbox, f"{make_logs(owner)} && chmod a+rx /tests /tests/test.sh", "looking for /tests/test.sh")
    else:
        await upload_tests(sandbox, grading, before)
    result = await run_tests(sandbox, grading, before, env=env, workdir=grading.apart.workdir)
    await sandbox.end_processes()
    left_out = [name for artifact in carried for name in artifact.left_out]
    output = await output_of(sandbox) + _account(left_out)
    rewards = await read_rewards(sandbox)
    return verdict_of(result, rewards, output, services=0, services_kept=False, left_out=len(left_out))


async def _place(sandbox: Sandbox, artifact: Carried, owner: str) -> None:
    """It belongs to whom the tests run as, who may not be root: then no mode keeps them from reading it."""
    if artifact.local is None:
        return
    await sandbox.upload_dir(artifact.local, artifact.into, user=ROOT)
    way = shlex.quote(artifact.target)
    give = f"chown -R -h {owner} {way} && chmod {artifact.mode:o} {way}"
    await checked(sandbox, give, "giving an artifact to the tests' user")


def _account(left_out: Sequence[str]) -> str:
    """For people, at the end of what the tests printed. A name is as the agent has chosen it."""
    if not left_out:
        return ""
    names = ", ".join(ascii(name)[:100] for name in left_out[:NAMED])
    more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
    return f"\n[not carried over, as a link that leads out of its artifact, or what is no file: {names}{more}]"
