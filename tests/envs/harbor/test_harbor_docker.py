"""Harbor tasks on a real engine: solutions pass, doing nothing fails, forged rewards count nothing, nothing stays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import docker
import pytest
from scripted import ScriptedStudent
from test_harbor_env import RENDERER, EachSays, bash
from test_harbor_task import make_task

from envs.harbor.attempt import HarborSettings
from envs.harbor.dataset import STARTER, load_harbor_dataset
from envs.harbor.env import HarborEnvGroupBuilder
from envs.harbor.sandboxes import DockerSandboxes
from envs.harbor.task import HarborTask, load_task
from envs.rollout import run_group
from envs.types import EpisodeGroup
from errors import SandboxUnavailableError
from recipes import evaluate_harbor
from recipes.cli import parse_config
from sandbox.base_image import ensure_base_image
from sandbox.docker_engine import connect
from sandbox.reap import SANDBOX_LABEL
from training.run_dir import read_metrics

pytestmark = [pytest.mark.docker, pytest.mark.anyio]
RUN = f"harbor-test{os.getpid()}"
STARTERS = load_harbor_dataset(STARTER).tasks


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[docker.APIClient]:
    try:
        client = connect()
    except SandboxUnavailableError as error:
        if os.environ.get("REQUIRE_DOCKER") == "1":
            raise
        pytest.skip(str(error))
    with client:
        ensure_base_image()
        yield client


def sandboxes_left(client: docker.APIClient, run: str = RUN) -> list[dict]:
    return client.containers(all=True, filters={"label": f"{SANDBOX_LABEL}={run}"})


@pytest.fixture(autouse=True)
def nothing_is_left(client: docker.APIClient) -> Iterator[None]:
    yield
    assert sandboxes_left(client) == []


async def attempts(task: HarborTask, *texts: str, group_size: int = 1, **settings: Any) -> EpisodeGroup:
    """Graded attempts of a student that says these texts."""
    builder = HarborEnvGroupBuilder(
        "d", "t", task, RENDERER, DockerSandboxes(RUN), HarborSettings(**settings), group_size=group_size,
        max_turns=10, max_tokens=4000, max_trajectory_tokens=20000, rewarded=True,
    )  # fmt: skip
    return await run_group(builder, EachSays(*texts), temperature=1.0, seed=0)


def heard(group: EpisodeGroup) -> list[str]:
    return [m["content"] for turn in group.episodes[0].turns for m in turn.observation]


async def reward_of(task: HarborTask, *commands: str, **settings: Any) -> float:
    group = await attempts(task, *map(bash, commands), "Done.", **settings)
    assert group.dropped == (), group.causes
    return group.episodes[0].reward


# --- the tasks that ship


@pytest.mark.parametrize("agent", ["oracle", "nop"])
async def test_every_task_that_ships_passes_with_its_solution_and_fails_without(agent: str):
    config = parse_config(evaluate_harbor.Config, [f"agent={agent}"])
    rewards = {}

    async def one(task: HarborTask) -> None:
        record = await evaluate_harbor.solve(config, task, 0, DockerSandboxes(RUN))
        rewards[task.task_id] = record.reward if record.dropped is None else record.cause

    async with anyio.create_task_group() as tasks:
        for task in STARTERS.values():
            tasks.start_soon(one, task)
    assert rewards == dict.fromkeys(STARTERS, 1.0 if agent == "oracle" else 0.0)


# --- forged rewards

FORGERIES = {
    "written beforehand": "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; "
    "echo '{\"reward\": 1}' > /logs/verifier/reward.json; chmod 444 /logs/verifier/*; chmod 555 /logs/verifier",
    "written again and again": "(while true; do mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; "
    "sleep 0.01; done) > /dev/null 2>&1 &",
    "by a daemon": 'setsid bash -c \'trap "" TERM HUP; while true; do mkdir -p /logs/verifier; '
    "echo 1 > /logs/verifier/reward.txt; done' > /dev/null 2>&1 &",
    "beside a server": "python3 -m http.server 8123 > /dev/null 2>&1 &\n(while true; do mkdir -p /logs/verifier; "
    "echo 1 > /logs/verifier/reward.txt; sleep 0.01; done) > /dev/null 2>&1 &\nsleep 0.5",
    "by tests of one's own": "mkdir -p /tests; echo 'echo 1 > /logs/verifier/reward.txt' > /tests/test.sh; "
    "echo 'print(1)' > /tests/check.py; chmod 555 /tests",
    "by a link": "mkdir -p /tmp/t /tmp/v; ln -s /tmp/t /tests; mkdir -p /logs; ln -s /tmp/v /logs/verifier; "
    "echo 1 > /tmp/v/reward.txt",
    "by the shell": "python3() { true; }; export -f python3; alias echo='echo 1 #'; "
    "mkdir -p /tmp/b; printf '#!/bin/bash\\nexit 0\\n' > /tmp/b/python3; chmod +x /tmp/b/python3; "
    "export PATH=/tmp/b:$PATH BASH_ENV=/tmp/env ENV=/tmp/env; echo 'echo 1 > /logs/verifier/reward.json' > /tmp/env; "
    "trap 'echo 1 > /logs/verifier/reward.txt' EXIT CHLD TERM; PROMPT_COMMAND='echo 1 > /logs/verifier/reward.txt'",
}


@pytest.mark.parametrize("how", FORGERIES)
async def test_a_forged_reward_counts_nothing(how: str):
    assert await reward_of(STARTERS["edit-json"], FORGERIES[how]) == 0.0


EVASIONS = {
    "a fork bomb": "b() { b | b & }; b",
    "a file in place of /logs": "rm -rf /logs; echo > /logs",
    "a link from /logs to /tests": "rm -rf /logs; ln -s /tests /logs",
    "what is no folder in /logs": "rm -rf /logs; mkdir /logs; echo > /logs/agent; ln -s /nowhere /logs/artifacts",
}


@pytest.mark.parametrize("how", EVASIONS)
async def test_an_attempt_cannot_keep_itself_from_being_graded(how: str):
    assert await reward_of(STARTERS["edit-json"], EVASIONS[how]) == 0.0


UNTIL_IT_LISTENS = "for i in {1..300}; do grep -q ' 0A ' /proc/net/tcp && break; sleep 0.1; done"
SERVERS = {  # one thing that forges and listens
    "on a port": "AF_INET",
    "on a unix socket": "AF_UNIX",
}


@pytest.mark.parametrize("where", SERVERS)
@pytest.mark.parametrize("keep", [False, True])
async def test_a_server_that_forges_is_ended_like_anything_else(where: str, keep: bool):
    """Unless it is a server and servers are to be kept: then its reward is listed apart, since it may be forged."""
    address = "('127.0.0.1', 8123)" if where == "on a port" else "'/tmp/s'"
    forge = (
        f"import socket, time\ns = socket.socket(socket.{SERVERS[where]}); s.bind({address}); s.listen()\n"
        "while True:\n  try: open('/logs/verifier/reward.json', 'w').write('{\"reward\": 1}')\n"
        "  except OSError: pass\n  time.sleep(0.005)\n"
    )
    start = f"cat > /tmp/f.py <<'E'\n{forge}E\nsetsid python3 /tmp/f.py > /dev/null 2>&1 &\n"
    start += UNTIL_IT_LISTENS if where == "on a port" else "sleep 2"
    group = await attempts(STARTERS["edit-json"], bash(start), "Done.", keep_services=keep)
    listens = float(where == "on a port")
    if keep and listens and not group.episodes:  # it was read while half written: no reward either
        return
    (episode,) = group.episodes
    assert (episode.metrics["services"], episode.metrics["services_kept"]) == (listens, listens * keep)
    if not (keep and listens):
        assert episode.reward == 0.0


FEEDER = """
import os, sys, time
while True:  # writes into every shell that the engine has started, ours too
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            parent = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1]
            name = open(f'/proc/{pid}/comm').read().strip()
            if parent == '0' and name == 'bash' and pid not in sys.argv[1:]:
                sys.argv.append(pid)
                handle = os.open(f'/proc/{pid}/fd/0', os.O_WRONLY | os.O_NONBLOCK)
                os.write(handle, b'head() { echo 1; }; cat() { true; }; printf() { builtin printf "$@"; }; true\\n')
        except (OSError, IndexError):
            pass
    time.sleep(float(os.environ['PAUSE']))
"""


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
async def test_what_is_written_into_our_shells_forges_no_reward(pause_s: float):
    task = STARTERS["grow-a-report"]
    first = (task.folder / "steps/first-list/solution/solve.sh").read_text()
    feed = (
        f"cat > /tmp/f.py <<'E'\n{FEEDER}E\nPAUSE={pause_s} setsid python3 /tmp/f.py $$ > /dev/null 2>&1 &\nsleep 0.5"
    )
    group = await attempts(task, bash(first), "One.", bash(feed), "Two.")
    assert [e.reward for e in group.episodes] in ([], [0.5])
    early = await attempts(task, bash(feed), "One.", "Two.")
    assert [e.reward for e in early.episodes] in ([], [0.0])


async def test_honest_work_passes_whatever_else_was_left():
    task = STARTERS["edit-json"]
    solution = (task.folder / "solution/solve.sh").read_text()
    assert await reward_of(task, *FORGERIES.values(), f"unset -f python3; export PATH=/usr/bin; {solution}") == 1.0


async def test_tests_and_solution_cannot_be_seen():
    group = await attempts(STARTERS["edit-json"], bash("ls -a / /app; ls /tests /solution /logs"), "Done.")
    (listing,) = heard(group)
    assert "settings.json" in listing and listing.count("No such file") == 3
    assert "Dockerfile" not in listing and "solve.sh" not in listing


async def test_between_steps_a_forged_reward_counts_nothing_either():
    task = STARTERS["grow-a-report"]
    first = (task.folder / "steps/first-list/solution/solve.sh").read_text()
    group = await attempts(task, bash(FORGERIES["by a daemon"]), "One.", group_size=1)
    assert (group.episodes[0].reward, len(group.episodes[0].turns)) == (0.0, 2)  # the step's least reward is 1
    again = await attempts(task, bash(FORGERIES["written again and again"]), bash(first), "One.", "Two.")
    assert (again.episodes[0].reward, len(again.episodes[0].turns)) == (0.5, 4)


# --- what tasks ask for


def a_task(folder: Path, test: str, toml: str = "", dockerfile: str = "FROM protege-base\n") -> HarborTask:
    make_task(folder, f"{toml}\n[environment]\nallow_internet = false\n", dockerfile=dockerfile)
    (folder / "tests/test.sh").write_text(f"#!/bin/bash\n{test}\n")
    return load_task(folder)


REWARD_IF = "if {}; then echo 1; else echo 0; fi > /logs/verifier/reward.txt"


async def test_a_server_that_the_task_asks_for_still_answers_if_it_is_kept(tmp_path: Path):
    ask = 'python3 -c \'import urllib.request as u; assert u.urlopen("http://127.0.0.1:8080").read() == b"hello"\''
    task = a_task(tmp_path, REWARD_IF.format(ask))
    site = "mkdir -p /srv; printf hello > /srv/index.html; cd /srv"
    serve = f"{site}; python3 -m http.server 8080 > /dev/null 2>&1 &\n{UNTIL_IT_LISTENS}"
    assert await reward_of(task, serve, keep_services=True) == 1.0
    assert await reward_of(task, "true", keep_services=True) == 0.0
    assert await reward_of(task, serve) == 0.0


async def test_users_environment_and_folder_are_the_tasks(tmp_path: Path):
    toml = (
        '[agent]\nuser = "user"\n[verifier]\nuser = "user"\n[verifier.env]\nCOLOUR = "${COLOUR:-green}"\n'
        '[environment.env]\nTASTE = "sweet"\n[environment]\nworkdir = "/home/user"'
    )
    make_task(tmp_path, toml, dockerfile="FROM protege-base\n")
    seen, expected = "$(id -un) $COLOUR $TASTE $PWD $(cat made)", "user green sweet /home/user by-user"
    test = REWARD_IF.format(f'[ "{seen}" = "{expected}" ]')
    (tmp_path / "tests/test.sh").write_text(f"#!/bin/bash\n{test}\n")
    task = load_task(tmp_path)
    group = await attempts(
        task, bash('printf by-$(id -un) > made; echo "$TASTE $COLOUR $PWD"'), "Done.", network="none"
    )
    assert group.dropped == (), group.causes
    assert (heard(group), group.episodes[0].reward) == (["sweet  /home/user"], 1.0)


@pytest.mark.parametrize(
    ("test", "cause"),
    [
        ("sleep 60", "did not end within verifier.timeout_sec=2 s"),
        ("exit 3", "ended with status 3 and wrote neither"),
        ("echo many > /logs/verifier/reward.txt", "expected one finite number, got 'many'"),
        ("echo 1 > /logs/verifier/reward.txt; kill -9 -1", "wrote neither|sandbox failed|status 137|gone"),
    ],
)
async def test_tests_that_give_no_reward_drop_the_attempt(tmp_path: Path, test: str, cause: str):
    group = await attempts(a_task(tmp_path, test, "[verifier]\ntimeout_sec = 2"), "Done.")
    if test.endswith("-1"):  # what it killed includes its own shell: no agreement, so no reward
        assert all(episode.reward == 0.0 for episode in group.episodes)
        return
    assert group.dropped == ("verifier",) and cause in group.causes[0]


async def test_a_reward_needs_tests_that_succeed(tmp_path: Path):
    group = await attempts(a_task(tmp_path, "echo 1 > /logs/verifier/reward.txt; exit 1"), "Done.")
    (episode,) = group.episodes
    assert (episode.reward, episode.metrics["verifier_overruled"]) == (0.0, 1.0)


# --- our failures


async def test_a_container_killed_under_a_command_drops_that_attempt_alone(client: docker.APIClient):
    groups: list[EpisodeGroup] = []

    async def run() -> None:
        groups.append(await attempts(STARTERS["edit-json"], bash("sleep 2; echo slept"), "Done.", group_size=3))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        while len(running := client.containers(filters={"label": f"{SANDBOX_LABEL}={RUN}"})) < 3:
            await anyio.sleep(0.05)
        await anyio.sleep(0.8)
        client.kill(running[0]["Id"])
    (group,) = groups
    assert group.dropped == ("sandbox",) and len(group.episodes) == 2
    assert [e.turns[0].observation[0]["content"] for e in group.episodes] == ["slept", "slept"]


async def test_no_more_sandboxes_than_allowed_at_once(client: docker.APIClient):
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(client.containers(filters={"label": f"{SANDBOX_LABEL}={RUN}"})))
            await anyio.sleep(0.02)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        group = await attempts(STARTERS["sum-csv"], bash("sleep 0.3"), "Done.", group_size=5, max_sandboxes=2)
        tasks.cancel_scope.cancel()
    assert len(group.episodes) == 5 and most == 2


async def test_the_log_is_what_was_sent_and_said():
    student = ScriptedStudent(RENDERER, bash("ls"), "I see. " + bash("cat settings.json | head -2"), "Done.")
    builder = HarborEnvGroupBuilder(
        "d", "t", STARTERS["edit-json"], RENDERER, DockerSandboxes(RUN), HarborSettings(), group_size=1,
        max_turns=10, max_tokens=400, max_trajectory_tokens=5000,
    )  # fmt: skip
    (episode,) = (await run_group(builder, student, temperature=1.0, seed=0)).episodes
    ids = episode.token_ids.tolist()
    assert [ids[: t.start] for t in episode.turns] == student.sent
    assert [ids[t.start : t.end] for t in episode.turns] == student.said
    assert episode.num_sampled == sum(map(len, student.said))
    assert [m["content"] for t in episode.turns for m in t.observation] == [
        "settings.json", '{\n  "name": "greenhouse",',
    ]  # fmt: skip


# --- the recipe


def test_an_evaluation_goes_on_where_it_stopped(
    tmp_path: Path, client: docker.APIClient, capsys: pytest.CaptureFixture[str]
):
    argv = ["agent=oracle", f"log_path={tmp_path / 'run'}", "task_names=edit-json,sum-csv", "samples=2"]
    evaluate_harbor.main(parse_config(evaluate_harbor.Config, argv))
    file = tmp_path / "run/episodes/step_000000.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 4 and "4 of 4 attempts to make" in capsys.readouterr().out
    dropped = json.loads(lines[1]) | {"dropped": "sandbox", "cause": "x", "reward": None}
    file.write_text(lines[0] + json.dumps(dropped) + "\n" + lines[2] + lines[3][:50])  # as a kill leaves it
    evaluate_harbor.main(parse_config(evaluate_harbor.Config, argv))
    out = capsys.readouterr().out
    assert "2 of 4 attempts to make" in out and "± 0.0000" in out
    (results,) = read_metrics(tmp_path / "run")
    assert (results["attempts"], results["graded"], results["pass_rate"]) == (4, 4, 1.0)
    assert sandboxes_left(client, "run") == []
