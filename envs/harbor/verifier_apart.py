"""Grading in a container that the agent has never been in, as a task may ask (`environment_mode = "separate"`).

The task's artifacts, files and folders by name, are all that is carried over; nothing else of what the agent did
can reach the tests or the reward. What the artifacts hold may still be run by the tests, so the rules of
`envs/harbor/verifier.py` for what is left running hold there, too.
"""

from __future__ import annotations

import fnmatch
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
    FOLDER,
    HOUSEKEEPING_S,
    Verdict,
    VerifierError,
    checked,
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


@dataclass(frozen=True)
class Carried:
    """One artifact on its way: a local file or folder, and where it belongs."""

    local: Path
    target: str
    executable: bool


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
                found
                for number, artifact in enumerate([PUBLISHED, *grading.artifacts])
                if (found := await _fetch(agent, artifact, workdir, Path(folder, str(number)))) is not None
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


async def _fetch(agent: Sandbox, artifact: Artifact, workdir: str | None, local: Path) -> Carried | None:
    """None: it is not there, which the tests will see for themselves. Where it goes is never the sandbox's word, in
    which the agent may have replaced every program."""
    target = str(PurePosixPath(workdir or "/", artifact.source))
    script = (
        f"p={shlex.quote(target)}; "
        '[ -d "$p" ] && k=folder || { [ -x "$p" ] && k=program || { [ -f "$p" ] && k=file || k=nothing; }; }; '
        'printf %s "$k"'
    )
    said = await agent.run_apart(script, timeout_s=HOUSEKEEPING_S, user=ROOT)
    kind = said.decode("utf-8", errors="replace")
    if kind == "folder":
        await agent.download_dir(target, local, max_bytes=ARTIFACT_BYTES)
        await to_thread.run_sync(_exclude, local, artifact.exclude)
    elif kind in ("file", "program"):
        local.write_bytes(await agent.read_file(target, max_bytes=ARTIFACT_BYTES))
    else:
        return None
    return Carried(local, target, kind == "program")


def _exclude(folder: Path, patterns: Sequence[str]) -> None:
    """As tar does: a pattern is one of a path's ends, from any folder on."""
    for path in sorted(folder.rglob("*"), reverse=True):
        parts = PurePosixPath(path.relative_to(folder)).parts
        ends = ["/".join(parts[n:]) for n in range(len(parts))]
        if any(fnmatch.fnmatch(end, pattern.rstrip("/")) for end in ends for pattern in patterns):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


async def _grade(sandbox: Sandbox, carried: Sequence[Carried], grading: Grading, env: Mapping[str, str]) -> Verdict:
    assert grading.apart is not None
    before = await look_before(sandbox, [grading.user], timeout_s=HOUSEKEEPING_S)
    for artifact in carried:
        if artifact.local.is_dir():
            way = shlex.quote(artifact.target)
            clear = f"[ -d {way} ] && [ ! -L {way} ] || rm -rf {way}"  # a folder is filled: shells may stand in it
            await checked(sandbox, clear, "clearing the way for an artifact")
            await sandbox.upload_dir(artifact.local, artifact.target)
        else:
            mode = 0o755 if artifact.executable else 0o644
            content = await to_thread.run_sync(artifact.local.read_bytes)
            await sandbox.write_file(artifact.target, content, mode=mode, user=ROOT)
    if grading.apart.bundled:
        owner = before.numbers[grading.user]
        folders = f"rm -rf {FOLDER} && mkdir -p {FOLDER} /logs/artifacts && chown {owner} {FOLDER}"
        await checked(sandbox, f"{folders} && chmod a+rx /tests /tests/test.sh", "looking for /tests/test.sh")
    else:
        await upload_tests(sandbox, grading, before)
    result = await run_tests(sandbox, grading, before, env=env, workdir=grading.apart.workdir)
    await sandbox.end_processes()
    return verdict_of(result, await read_rewards(sandbox), await output_of(sandbox), services=0, services_kept=False)
