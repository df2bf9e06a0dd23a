"""Verifiers in a container of their own, on a real engine; and what root with ptrace can do to our shells."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_harbor_docker import FORGERIES, UNTIL_IT_LISTENS, attempts, bash, client, nothing_is_left, reward_of
from test_harbor_task import make_task

from envs.harbor import attempt, verifier
from envs.harbor.dataset import STARTER, load_harbor_dataset
from envs.harbor.task import HarborTask, load_task
from envs.harbor.verifier_apart import _exclude

__all__ = ["client", "nothing_is_left"]  # fixtures

docker_test = pytest.mark.docker

APART = """
artifacts = ["/app/answer", {source = "/app/tree", exclude = ["*.log", "cache"]}, "/app/missing"]
[verifier]
environment_mode = "separate"
env = {WANTED = "42"}
[environment]
network_mode = "no-network"
memory_mb = 256
"""
GRADER = """#!/bin/bash
set -ex
echo 0 > /logs/verifier/reward.txt
test "$(cat /app/answer)" = "$WANTED"
test "$(find /app/tree | sort | tr '\\n' ' ')" = "/app/tree /app/tree/a /app/tree/a/keep /app/tree/link "
test -x /app/tree/a/keep && test ! -e /agent-was-here && test ! -e /app/missing
echo 1 > /logs/verifier/reward.txt
"""
WORK = (
    "cd /app; echo 42 > answer; mkdir -p tree/a tree/cache; echo x > tree/a/keep; chmod +x tree/a/keep; "
    "ln -s a/keep tree/link; touch tree/a/b.log tree/cache/c; ln -s /etc/passwd tree/out"
)


def make_apart(folder: Path, *, bundled: bool) -> HarborTask:
    files = {"tests/test.sh": GRADER}
    if bundled:
        files["tests/Dockerfile"] = "FROM protege-base\nWORKDIR /tests\nCOPY . /tests/\n"
    return load_task(make_task(folder, APART, dockerfile="FROM protege-base\nWORKDIR /app\n", **files))


@docker_test
@pytest.mark.anyio
@pytest.mark.parametrize("bundled", [True, False])
async def test_only_artifacts_reach_a_verifier_apart(tmp_path: Path, bundled: bool):
    task = make_apart(tmp_path, bundled=bundled)
    assert await reward_of(task, WORK + "; touch /agent-was-here") == 1.0
    assert await reward_of(task, "true") == 0.0
    assert await reward_of(task, WORK + "; echo 41 > answer") == 0.0


@docker_test
@pytest.mark.anyio
async def test_nothing_that_root_does_forges_a_reward_apart(tmp_path: Path):
    task = make_apart(tmp_path, bundled=True)
    replaced = "for p in bash cat test tar find; do printf '#!/bin/sh\\nexit 0\\n' > /tmp/x; done; rm /usr/bin/ps"
    served = f"setsid python3 -m http.server 8123 > /dev/null 2>&1 & {UNTIL_IT_LISTENS}"
    published = "mkdir -p /logs/artifacts; echo 1 > /logs/artifacts/reward.txt; ln -s /logs/verifier /app/tree"
    assert await reward_of(task, *FORGERIES.values(), replaced, served, published) == 0.0


@docker_test
@pytest.mark.anyio
async def test_a_program_among_the_artifacts_that_the_tests_run_cannot_stay_to_forge(tmp_path: Path):
    grader = "#!/bin/bash\necho 0 > /logs/verifier/reward.txt\nbash /app/answer\nexit 0\n"
    task = load_task(
        make_task(tmp_path, APART, dockerfile="FROM protege-base\nWORKDIR /app\n", **{"tests/test.sh": grader})
    )
    late = "setsid bash -c 'sleep 0.3; echo 1 > /logs/verifier/reward.txt; sleep 60' > /dev/null 2>&1 &"
    assert await reward_of(task, f'printf "%s" "{late}" > /app/answer') == 0.0


TRACER = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
seen = {str(os.getpid()), *sys.argv[1:]}
while True:  # holds every shell that is started from outside: ours too, as long as this runs
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            parent = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1]
        except OSError:
            continue
        if parent == '0' and pid not in seen:
            seen.add(pid)
            print(libc.ptrace(16, int(pid), 0, 0), flush=True)
    time.sleep(0.001)
"""


@docker_test
@pytest.mark.anyio
@pytest.mark.parametrize("name", ["edit-json", "grow-a-report"])
async def test_tracing_our_shells_forges_no_reward(name: str, monkeypatch: pytest.MonkeyPatch):
    """Root can hold what its own user runs. What decides a reward is begun after the end of everything that ran."""
    for module in (attempt, verifier):
        monkeypatch.setattr(module, "HOUSEKEEPING_S", 5.0)
    task = load_harbor_dataset(STARTER).tasks[name]
    trace = f"cat > /tmp/t.py <<'E'\n{TRACER}E\nsetsid python3 /tmp/t.py 1 $$ > /tmp/said 2>&1 & sleep 0.5"
    group = await attempts(task, bash(trace), "Done.", "Done.")
    assert [e.reward for e in group.episodes] in ([], [0.0])


def test_exclusions_are_tars(tmp_path: Path):
    for name in ("a/x.pyc", "a/y.py", "node_modules/m/i.js", "b/node_modules/z", "c/d/e", "c/d/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    _exclude(tmp_path, ["*.pyc", "node_modules/", "d/e"])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == ["a/y.py", "c/d/f"]
