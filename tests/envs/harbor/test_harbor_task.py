"""Task folders as they are published: every version's spellings, what is refused, what is named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from envs.harbor.task import HarborTask, UnsupportedTaskError, check_variables, load_task, resolve_variables
from errors import ConfigError, DataError

PUBLISHED = """
schema_version = "1.1"
artifacts = []

[task]
name = "some-bench/some-task"
description = "A task."
keywords = ["git"]
[[task.authors]]
name = "A Person"
email = "person@example.com"

[metadata]
difficulty = "easy"
expert_time_estimate_min = 5.0

[verifier]
timeout_sec = 900.0

[agent]
timeout_sec = 750.0

[environment]
build_timeout_sec = 500.0
docker_image = "somebody/some-task:20260403"
cpus = 2
memory_mb = 4096
storage_mb = 10240
gpus = 0
allow_internet = true
mcp_servers = []

[verifier.env]

[environment.env]

[solution.env]
"""

OLD = """
version = "1.0"

[metadata]
author_name = "A Person"

[verifier]
timeout_sec = 180.0

[agent]
timeout_sec = 300.0

[environment]
build_timeout_sec = 600.0
cpus = 1
memory = "2G"
storage = "10G"
"""


def make_task(folder: Path, toml: str = "", *, dockerfile: str | None = "FROM x\n", **files: str) -> Path:
    """A task folder. `files` by path with `__` for `/` and without `.md` or `.sh`'s dots: see `PATHS`."""
    content = {"instruction.md": "Do it.\n", "tests/test.sh": "#!/bin/bash\n", "task.toml": toml} | files
    if dockerfile is not None:
        content["environment/Dockerfile"] = dockerfile
    for name, text in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_task_as_it_is_published_now(tmp_path: Path):
    task = load_task(make_task(tmp_path / "some-task", PUBLISHED, dockerfile=None))
    assert (task.task_id, task.instruction) == ("some-task", "Do it.\n")
    assert (task.image, task.build_timeout_s) == ("somebody/some-task:20260403", 500.0)
    assert (task.cpus, task.memory_mb, task.network) == (2.0, 4096, True)
    (step,) = task.steps
    assert (step.agent_timeout_s, step.agent_user, step.solution) == (750.0, None, None)
    assert (step.grading.timeout_s, step.grading.env, step.grading.user) == (900.0, {}, None)
    assert task.notes == ("environment.storage_mb: the disk has no limit of its own",)
    assert pickle.loads(pickle.dumps(task)) == task


def test_a_task_of_the_first_version(tmp_path: Path):
    task = load_task(make_task(tmp_path, OLD, **{"solution/solve.sh": "true"}))
    assert (task.memory_mb, task.cpus, task.network, task.image) == (2048, 1.0, True, None)
    assert task.steps[0].solution == tmp_path / "solution"
    assert task.context == tmp_path / "environment"


def test_an_empty_task_toml_has_harbors_defaults(tmp_path: Path):
    task = load_task(make_task(tmp_path))
    assert (task.build_timeout_s, task.cpus, task.memory_mb, task.network) == (600.0, None, None, True)
    assert (task.steps[0].grading.timeout_s, task.steps[0].agent_timeout_s) == (600.0, None)
    assert task.notes == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<!-- bench-canary GUID 1-2 -->\n\nDo it.", "Do it."),
        ("# BENCHMARK DATA canary GUID 1\n# Canary 2\n\n\n# Title\ncanary", "# Title\ncanary"),
        ("Do it.\n<!-- canary -->\n", "Do it.\n<!-- canary -->\n"),
        ("\n# Title\n", "\n# Title\n"),
    ],
)
def test_leading_canary_lines_are_stripped(tmp_path: Path, text: str, expected: str):
    assert load_task(make_task(tmp_path, **{"instruction.md": text})).instruction == expected


@pytest.mark.parametrize(
    ("environment", "network"),
    [
        ("", True),
        ("allow_internet = true", True),
        ("allow_internet = false", False),
        ('network_mode = "public"', True),
        ('network_mode = "no-network"\nallow_internet = false', False),
        ('network_mode = "allowlist"', False),  # of no host
        ("allow_internet = true\n[agent]\nnetwork_mode = 'no-network'", False),
        ("allow_internet = false\n[verifier]\nnetwork_mode = 'public'", False),
    ],
)
def test_network(tmp_path: Path, environment: str, network: bool):
    assert load_task(make_task(tmp_path, f"[environment]\n{environment}")).network is network


@pytest.mark.parametrize(
    ("toml", "note"),
    [
        ("[environment]\ngpus = 1", "environment.gpus: sandboxes have no GPU"),
        ("[[environment.mcp_servers]]\nname = 'm'", "environment.mcp_servers: the student has bash only"),
        ("[environment.healthcheck]\ncommand = 'true'", "healthcheck: not run"),
        ("[environment]\nskills_dir = '/skills'", "environment.skills_dir: the student has no skills"),
        ("artifacts = ['/app/x']", "artifacts: not collected"),
        ("[environment]\ndisk = 3", "environment.disk: unknown key"),
        ("[agent]\ntimeout = 3", "agent.timeout: unknown key"),
        ("surprise = 1", "surprise: unknown key"),
        (
            "[verifier]\nnetwork_mode = 'no-network'",
            "verifier.network_mode=no-network: the verifier has what the agent",
        ),
        ("[environment]\ndocker_image = 'x'", "environment/Dockerfile: not built, environment.docker_image wins"),
    ],
)
def test_what_is_not_honoured_is_named(tmp_path: Path, toml: str, note: str):
    (found,) = load_task(make_task(tmp_path, toml)).notes
    assert found.startswith(note)


@pytest.mark.parametrize(
    ("toml", "files", "part"),
    [
        ("", {"environment/docker-compose.yaml": "services: {}"}, "docker-compose.yaml: it has no service 'main'"),
        ("", {"environment/docker-compose.yaml": "services: {main: , db: {image: x}}"}, "services db besides 'main'"),
        ("", {"tests/compose.yaml": "services: {main: {privileged: true}}"}, "services.main.privileged"),
        ("", {"environment/compose.yaml": "services: {main: {command: ./serve}}"}, "command='./serve'"),
        ("", {"environment/compose.yaml": "services: {main: {build: {context: ..}}}"}, "services.main.build"),
        ("", {"environment/compose.yaml": "{services: {main: {}}, volumes: {v: {}}}"}, "volumes besides services"),
        (
            "",
            {"environment/compose.yaml": "services: {main: {environment: [A=$B]}}"},
            "environment.A='$B': only ${NAME}",
        ),
        (
            "",
            {"environment/compose.yaml": "services: {main: {environment: 5}}"},
            "services.main.environment=5: expected names with values",
        ),
        ("artifacts = [{source = '/x', service = 'db'}]", {}, "service='db'"),
        (
            "",
            {"dockerfile": "FROM x\nCOPY <<A /a\n$B\nA\n"},
            "environment/Dockerfile: a Dockerfile's heredoc",
        ),
        (
            "[verifier]\nenvironment_mode='separate'",
            {"tests/Dockerfile": "FROM x\nRUN <<A\n"},
            "tests/Dockerfile: a Dockerfile's heredoc <<A in line 2 has no end",
        ),
        ("[verifier]\nenvironment_mode='separate'\nnetwork_mode='allowlist'", {}, "verifier.network_mode='allowlist'"),
        ("[environment]\nos = 'Windows'", {}, "environment.os='windows'"),
        ("[environment]\nallow_internet = false\nallowed_hosts = ['x.org']", {}, "network_mode='allowlist'"),
    ],
)
def test_what_cannot_run_here_is_refused_by_name(tmp_path: Path, toml: str, files: dict[str, str], part: str):
    with pytest.raises(UnsupportedTaskError) as error:
        load_task(make_task(tmp_path, toml, **files))
    assert part in str(error.value) and str(tmp_path) in str(error.value)


def test_a_compose_file_that_asks_for_one_container_only_gives_it_variables(tmp_path: Path):
    compose = "services: {main: {pull_policy: never, command: [sh, -c, sleep infinity], environment: [A=1, B=x=y]}}"
    task = load_task(make_task(tmp_path, "[environment.env]\nA = '2'", **{"environment/docker-compose.yaml": compose}))
    assert task.env == {"A": "2", "B": "x=y"} and task.notes == ()


def test_what_a_compose_file_asks_of_its_container_and_does_not_get_is_named(tmp_path: Path):
    compose = "services: {main: {hostname: box, cpus: 4, environment: {A: true, B: , C: '${D:-e}'}}}"
    task = load_task(make_task(tmp_path, **{"environment/compose.yaml": compose}))
    assert task.notes == ("compose.yaml: services.main.cpus", "compose.yaml: services.main.hostname")
    assert task.env == {"A": "true", "B": "${B:-}", "C": "${D:-e}"}  # the host's, only if it is let in
    assert resolve_variables(task.env, {"D": "f"}, "") == {"A": "true", "B": "", "C": "f"}


@pytest.mark.parametrize("part", ["tests", "solution", "steps/one/workdir"])
def test_a_link_that_leads_out_of_a_tasks_folder_is_named_as_it_is_read(tmp_path: Path, part: str):
    steps = {"steps/one/instruction.md": "Do."} if part.startswith("steps") else {}
    toml = "[[steps]]\nname = 'one'" if steps else ""
    make_task(tmp_path, toml, **{"solution/solve.sh": "true", f"{part}/x": "", **steps})
    (tmp_path / part / "link").symlink_to("x")
    load_task(tmp_path)
    (tmp_path / part / "out").symlink_to("../instruction.md")
    with pytest.raises(DataError, match=rf"cannot upload {tmp_path}/{part}/out: it links to"):
        load_task(tmp_path)


SEPARATE = (
    "artifacts = ['/app/out', {source = '/app/tree', exclude = ['*.pyc']}]\n[verifier]\nenvironment_mode = 'separate'\n"
)


@pytest.mark.parametrize(
    ("toml", "files", "image", "context", "bundled"),
    [
        ("[environment]\ndocker_image = 'agents'", {}, "agents", "environment", False),
        ("", {}, None, "environment", False),
        ("", {"tests/Dockerfile": "FROM y"}, None, "tests", True),
        ("[verifier.environment]\ndocker_image = 'graders'", {}, "graders", "tests", True),
    ],
)
def test_a_verifier_in_a_container_of_its_own(
    tmp_path: Path, toml: str, files: dict[str, str], image: str | None, context: str, bundled: bool
):
    task = load_task(make_task(tmp_path, SEPARATE + toml, **files))
    (step,) = task.steps
    place = step.grading.apart
    assert place is not None
    assert (place.image, place.context, place.bundled) == (image, tmp_path / context, bundled)
    assert [(a.source, a.exclude) for a in step.grading.artifacts] == [("/app/out", ()), ("/app/tree", ("*.pyc",))]
    assert task.notes in ((), ("environment/Dockerfile: not built, environment.docker_image wins",))


def test_a_verifier_apart_has_limits_of_its_own(tmp_path: Path):
    toml = "[environment]\nmemory_mb = 100\nallow_internet = false\n[verifier.environment]\nmemory_mb = 900\ncpus = 3"
    place = load_task(make_task(tmp_path, toml)).steps[0].grading.apart
    assert place is not None and (place.memory_mb, place.cpus, place.network) == (900, 3.0, True)
    toml = "[environment]\nmemory_mb = 100\nallow_internet = false\n[verifier]\nenvironment_mode = 'separate'"
    place = load_task(make_task(tmp_path / "b", toml)).steps[0].grading.apart
    assert place is not None and (place.memory_mb, place.network) == (100, False)


@pytest.mark.parametrize(
    ("toml", "part"),
    [
        ("artifacts = ['/app/../etc']", "artifacts[0].source: expected a path without '..'"),
        *(
            (
                f"artifacts = ['/app', '{taken}']\n[verifier]\nenvironment_mode = 'separate'",
                f"artifacts: '{taken}' would",
            )
            for taken in ("/", "/tests", "/tests/data", "/logs/verifier/x")
        ),
        (
            "artifacts = ['.']\n[environment]\nworkdir = '/'\n[verifier]\nenvironment_mode = 'separate'",
            "artifacts: '.'",
        ),
        ("[environment", "task.toml: not TOML"),
        ("[agent]\ntimeout_sec = 0", "task.toml: agent.timeout_sec: Input should be greater than 0, got 0"),
        ("[agent]\ntimeout_sec = 'long'", "agent.timeout_sec"),
        ("[environment]\nmemory = '2 buckets'", "environment.memory: expected a size such as '2G' or '512M'"),
        ("[environment]\nmemory = '2G'\nmemory_mb = 100", "memory and memory_mb differ"),
        ("[environment]\nallow_internet = true\nnetwork_mode = 'no-network'", "allow_internet contradicts"),
        ("[environment]\nnetwork_mode = 'some'", "environment.network_mode"),
        ("[environment]\nworkdir = 'app'", "environment.workdir: expected an absolute path"),
        ("[environment]\nenv = {A = ['x']}", "environment.env.A"),
        ("[[steps]]\nname = '../up'", "steps[0].name"),
        ("[[steps]]\nname = 'a'\n[[steps]]\nname = 'a'", "two steps have one name"),
        ("[[steps]]\nname = 'a'", "steps/a is missing"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, toml: str, part: str):
    with pytest.raises(DataError) as error:
        load_task(make_task(tmp_path, toml))
    assert part in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ("task.toml", "needs task.toml"),
        ("instruction.md", "instruction.md: cannot be read"),
        ("tests/test.sh", "test.sh is missing"),
        ("environment/Dockerfile", "environment/Dockerfile is missing"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, missing: str, part: str):
    (make_task(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=part):
        load_task(tmp_path)


def test_an_empty_instruction_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"instruction\.md: is empty"):
        load_task(make_task(tmp_path, **{"instruction.md": "<!-- canary -->\n \n"}))


STEPS = """
multi_step_reward_strategy = "final"
[agent]
timeout_sec = 50
user = "agent"
[verifier]
timeout_sec = 70
env = {A = "1", B = "2"}
[[steps]]
name = "one"
min_reward = 1
[[steps]]
name = "two"
min_reward = {safe = 0.5}
[steps.agent]
timeout_sec = 20
user = 1000
[steps.verifier]
timeout_sec = 30
user = "root"
env = {B = "3"}
"""


def steps_task(folder: Path) -> HarborTask:
    files: dict[str, Any] = {
        "steps/one/instruction.md": "First.",
        "steps/two/instruction.md": "Then.",
        "steps/two/tests/test.sh": "",
        "steps/two/solution/solve.sh": "",
        "steps/two/workdir/setup.sh": "",
    }
    return load_task(make_task(folder, STEPS, **files))


def test_steps_inherit_from_the_task(tmp_path: Path):
    task = steps_task(tmp_path)
    one, two = task.steps
    assert (task.instruction, task.reward_strategy) == ("First.", "final")
    assert (one.name, one.agent_timeout_s, one.agent_user, one.min_reward) == ("one", 50, "agent", {"reward": 1.0})
    assert (two.name, two.agent_timeout_s, two.agent_user, two.min_reward) == ("two", 20, "1000", {"safe": 0.5})
    assert (one.grading.timeout_s, one.grading.user, one.grading.env) == (70, None, {"A": "1", "B": "2"})
    assert (two.grading.timeout_s, two.grading.user, two.grading.env) == (30, "root", {"A": "1", "B": "3"})
    assert one.grading.tests == (tmp_path / "tests",)
    assert two.grading.tests == (tmp_path / "tests", tmp_path / "steps/two/tests")
    assert (one.workdir, one.solution) == (None, None)
    assert (two.workdir, two.solution) == (tmp_path / "steps/two/workdir", tmp_path / "steps/two/solution")


# --- variables


def test_variables_come_from_what_is_let_in_and_nowhere_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET", "of the host")
    env = {"A": "${SECRET:-none}", "B": "x${GIVEN}y", "C": "$HOME", "D": "${GIVEN:-}"}
    assert resolve_variables(env, {"GIVEN": "1"}, "here") == {"A": "none", "B": "x1y", "C": "$HOME", "D": "1"}
    with pytest.raises(ConfigError) as error:
        resolve_variables({"A": "${SECRET}"}, {}, "t/task.toml: environment.env")
    assert "t/task.toml: environment.env" in str(error.value) and "pass_env=SECRET" in str(error.value)
    assert "of the host" not in str(error.value)


@pytest.mark.parametrize("table", ["environment", "verifier", "solution"])
def test_a_variable_that_is_not_let_in_is_named_with_its_table(tmp_path: Path, table: str):
    task = load_task(make_task(tmp_path, f"[{table}]\nenv = {{KEY = '${{API_KEY}}', PORT = 8080}}"))
    with pytest.raises(ConfigError, match=rf"{table}\.env asks for this machine's \$API_KEY"):
        check_variables(task, {})
    check_variables(task, {"API_KEY": "k"})


@pytest.mark.parametrize("table", ["environment", "verifier", "solution"])
def test_a_variable_that_no_shell_can_have_is_refused_when_the_task_is_read(tmp_path: Path, table: str):
    with pytest.raises(DataError, match=rf"{table}\.env\.my-var"):
        load_task(make_task(tmp_path, f"[{table}.env]\nmy-var = 'x'"))
