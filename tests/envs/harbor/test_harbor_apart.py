"""Verifiers in a container of their own, on a real engine; and what root with ptrace can do to our shells."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_harbor_docker import FORGERIES, RUN, UNTIL_IT_LISTENS, attempts, bash, client, nothing_is_left, reward_of
from test_harbor_task import make_task

from envs.harbor import attempt, verifier
from envs.harbor.dataset import STARTER, load_harbor_dataset
from envs.harbor.sandboxes import DockerSandboxes
from envs.harbor.task import HarborTask, load_task
from envs.harbor.verifier_apart import _exclude
from recipes import evaluate_harbor
from recipes.cli import parse_config

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


def an_apart(
    folder: Path, grader: str, artifacts: str, *, dockerfile: str = "FROM protege-base", toml: str = "", **files: str
):
    """A task whose tests are `grader`, as a condition, in the agent's image made anew."""
    head = f"artifacts = {artifacts}\n[verifier]\nenvironment_mode = 'separate'\n{toml}"
    tests = f"#!/bin/bash\n(set -ex; {grader})\necho $(($? == 0)) > /logs/verifier/reward.txt\n"
    toml = f"{head}\n[environment]\nnetwork_mode = 'no-network'\nmemory_mb = 256\n"
    return load_task(make_task(folder, toml, dockerfile=f"{dockerfile}\n", **{"tests/test.sh": tests}, **files))


@docker_test
@pytest.mark.anyio
@pytest.mark.parametrize("user", ["root", "user"])
async def test_links_modes_and_times_go_along_and_the_tests_user_can_read_all(tmp_path: Path, user: str):
    work = (
        "umask 077; mkdir -p /app/tree/deep; cd /app/tree; echo x > deep/file; echo y > ../one; chmod 750 deep; "
        "printf '#!/bin/sh\necho ran' > run; chmod 710 run; touch -d @1000000000 old ../one; chown 4321:4321 old deep; "
        "ln -s /app/tree/deep/file absolute; ln -s ../tree/deep around; ln -s //app/tree deep/up; "
        "ln -s deep/file plain; mkdir /data; echo z > /data/z; ln -s /data/z /app/linked"
    )
    see = (
        "cd /app; test $(cat one linked tree/absolute tree/around/file tree/deep/up/plain | tr -d '\n') = yzxxx; "
        "test $(cd tree; stat -c %a . deep deep/file run old ../one | tr '\n' .) = 700.750.600.710.600.600.; "
        "test $(stat -c %Y tree/old one | tr '\\n' .) = 1000000000.1000000000.; test $(tree/run) = ran; "
        'test -z "$(find tree one linked ! -user $(id -u))"'
    )
    task = an_apart(tmp_path, see, '["/app/tree", "/app/one", "/app/linked"]', toml=f"user = '{user}'")
    group = await attempts(task, bash(work), "Done.")
    (episode,) = group.episodes
    assert (episode.reward, episode.metrics["artifacts_left_out"]) == (1.0, 0.0), episode.logs


@docker_test
@pytest.mark.anyio
async def test_what_leads_out_of_an_artifact_is_named_and_gives_no_way_to_the_tests_files(tmp_path: Path):
    work = (
        "mkdir -p /app/tree/in; cd /app/tree; ln -s /tests/expected answer; ln -s ../../tests/expected in/answer; "
        "ln -s ../../tests door; mkfifo pipe; touch in/skipped.log; ln -s /etc/passwd in/x.log; ln -s nowhere /app/lost"
    )
    see = (
        "test ! -e /app/tree/answer; test ! -e /app/tree/in/answer; test -d /app/tree/in; test ! -e /tests/kept; "
        "test ! -L /app/lost; test -L /app/tree/answer"  # the last fails: nothing of it may be there
    )
    artifacts = '[{source = "/app/tree", exclude = ["*.log"]}, "/app/tree/door/kept", "/app/lost"]'
    task = an_apart(tmp_path, see, artifacts, **{"tests/expected": "42\n"})
    (episode,) = (await attempts(task, bash(work + "; mkdir -p /tests; echo evil > /tests/kept"), "Done.")).episodes
    (said,) = episode.logs["verifier_output"]
    assert (episode.reward, episode.metrics["artifacts_left_out"]) == (0.0, 5.0), said
    assert "test '!' -L /app/lost\n+ test -L /app/tree/answer\n" in said  # so far, all held
    account = said[said.index("not carried over") :]
    for name in ("/app/tree/answer", "/app/tree/in/answer", "/app/tree/door", "/app/tree/pipe", "/app/lost"):
        assert f"'{name}'" in account
    assert ".log" not in account


@docker_test
@pytest.mark.anyio
async def test_what_the_agent_removed_is_not_there_for_the_tests_either(tmp_path: Path):
    image = "FROM protege-base\nRUN mkdir -p /app/tree/.old && touch /app/tree/junk /app/tree/.old/junk /app/gone"
    see = 'test "$(find /app | sort | tr "\\n" " ")" = "/app /app/tree /app/tree/new "'
    task = an_apart(tmp_path, see, '["/app/gone", "/app/tree"]', dockerfile=image)
    assert await reward_of(task, "rm -r /app/gone /app/tree/junk /app/tree/.old; touch /app/tree/new") == 1.0
    assert await reward_of(task, "touch /app/tree/new") == 0.0


@docker_test
@pytest.mark.anyio
@pytest.mark.parametrize("apart", [True, False])
async def test_an_image_of_a_plain_user_is_worked_in_and_graded(tmp_path: Path, apart: bool):
    image = "FROM protege-base\nRUN mkdir -p /app && chown user /app\nUSER user\nWORKDIR /app"
    task = an_apart(tmp_path, "test $(id -un) = user; test $(cat /app/who) = user", '["/app/who"]', dockerfile=image)
    if not apart:
        toml = tmp_path / "task.toml"
        toml.write_text(toml.read_text().replace("separate", "shared"))
        task = load_task(tmp_path)
    assert await reward_of(task, "umask 077; id -un > who") == 1.0
    assert await reward_of(task, "true") == 0.0


STEPS = """
artifacts = ["/app/first"]
[environment]
network_mode = "no-network"
memory_mb = 256
[verifier]
environment_mode = "separate"
[[steps]]
name = "one"
min_reward = 1.0
[[steps]]
name = "two"
artifacts = ["/app/second"]
[steps.verifier]
user = "user"
[[steps]]
name = "three"
[steps.verifier]
environment_mode = "shared"
"""


def make_steps(folder: Path) -> HarborTask:
    """Two steps that are graded apart, the second in an image of its own, and one in the agent's sandbox, which has
    lived all along: a process of the first step still runs in it."""
    conditions = {
        "one": "[ $(cat /app/first) = 1 ] && [ ! -e /app/other ] && [ ! -e /app/beat ]",
        "two": "[ $(cat /app/first /app/second | tr -d '\\n') = 12 ] && [ $(id -un) = user ] && [ -e /mine ]",
        "three": "[ -e /app/other ] && [ $(cat /app/third) = beating ]",
    }
    solutions = {
        "one": "(while true; do echo >> /app/beat; sleep 0.1; done) > /dev/null 2>&1 &\n"
        "echo 1 > /app/first; touch /app/other",
        "two": "(umask 077; echo 2 > /app/second)",
        "three": "a=$(wc -c < /app/beat); sleep 1; [ $(wc -c < /app/beat) -gt $a ] && echo beating > /app/third",
    }
    files = {"steps/two/tests/Dockerfile": "FROM protege-base\nCOPY . /tests/\nRUN touch /mine\n"}
    for name, condition in conditions.items():
        test = f"#!/bin/bash\nif {condition}; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n"
        files |= {
            f"steps/{name}/tests/test.sh": test,
            f"steps/{name}/instruction.md": f"Do {name}.",
            f"steps/{name}/solution/solve.sh": solutions[name] + "\n",
        }
    return load_task(make_task(folder, STEPS, dockerfile="FROM protege-base\nWORKDIR /app\n", **files))


@docker_test
@pytest.mark.anyio
async def test_steps_are_graded_apart_each_in_its_own_place(tmp_path: Path):
    task = make_steps(tmp_path)
    rewards = {}
    for agent in ("oracle", "nop"):
        config = parse_config(evaluate_harbor.Config, [f"agent={agent}"])
        record = await evaluate_harbor.solve(config, task, 0, DockerSandboxes(RUN))
        assert record.dropped is None, record.cause
        rewards[agent] = (record.reward, len(record.verifier_output))
    assert rewards == {"oracle": (1.0, 3), "nop": (0.0, 1)}
    lines = {step.name: (step.solution / "solve.sh").read_text() for step in task.steps if step.solution is not None}
    group = await attempts(task, bash(lines["one"]), "One.", bash("true"), "Two.", bash(lines["three"]), "Three.")
    assert [e.reward for e in group.episodes] == [pytest.approx(2 / 3)], group.causes


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
