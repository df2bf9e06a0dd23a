"""What an agent left running, and how it is kept from its work being graded.

A process that was left behind could rewrite the reward at any moment: everything is ended before the tests
run, and before the reward is read. Two things make it less simple. A task may ask for a server, which must
answer the tests: if the user says so, processes that listen on a TCP port go on, with their children, until the
tests have ended. And between the steps of a task, what the agent left running is stopped and goes on afterwards.

The scripts below are bash without other programs, and take nothing from /proc but numbers: a process
can name itself as it likes. They run apart from the shells, whose input a process of root can write to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from errors import SandboxError
from sandbox.types import Sandbox

ROOT = "0:0"
"""A user name that no agent has, so that the shell is not one that an agent has used."""

_SCAN = r"""
set -f
declare -A state parent began mine above
scan() {
  local folder pid line fields
  pids=() state=() parent=() began=()
  set +f; folders=(/proc/[0-9]*); set -f
  for folder in "${folders[@]}"; do
    pid=${folder#/proc/}
    line=
    { IFS= read -r -d '' line < "$folder/stat"; } 2>/dev/null  # whole: a name may hold newlines
    [[ $line ]] || continue
    fields=(${line##*) })
    [[ ${fields[1]} =~ ^[0-9]+$ && ${fields[19]} =~ ^[0-9]+$ ]] || fields=(? 0 - - - - - - - - - - - - - - - - - 0)
    pids+=("$pid") state[$pid]=${fields[0]} parent[$pid]=${fields[1]} began[$pid]=${fields[19]}
  done
}
below() {  # is process $1 one of those in the associative array $2, or below one of them?
  local -n those=$2
  local pid=$1
  while [[ -n $pid && $pid != 0 ]]; do
    [[ -n ${those[$pid]} ]] && return 0
    pid=${parent[$pid]}
  done
  return 1
}
lineage() {  # this shell, whose children are spared, and what it was started by, whose children are not
  local pid=$$
  mine[$$]=1
  while [[ -n $pid && $pid != 0 ]]; do above[$pid]=1; pid=${parent[$pid]}; done
}
"""

BEFORE = (
    "("
    + _SCAN
    + r"""
scan
for pid in "${pids[@]}"; do
  [[ $pid == $$ || $pid == $BASHPID ]] || printf '%s:%s ' "$pid" "${began[$pid]}"
done
)"""
)

_LISTENERS = r"""(
declare -A listening
for table in /proc/net/tcp /proc/net/tcp6; do
  [[ -r $table ]] && while read -r _ _ _ state _ _ _ _ _ inode _; do
    [[ $state == 0A ]] && listening[$inode]=1
  done < "$table"
done
for folder in /proc/[0-9]*; do
  pid=${folder#/proc/}
  for link in "$folder"/fd/*; do
    to=$(readlink "$link" 2>/dev/null)
    [[ $to == 'socket:['*']' ]] || continue
    inode=${to#socket:[}
    [[ -n ${listening[${inode%]}]} ]] && printf '%s ' "$pid" && break
  done
done
)"""

_STOP = (
    "("
    + _SCAN
    + r"""
declare -A keep spare seen
for key in $KEEP; do keep[$key]=1; done
for pid in $SPARE; do spare[$pid]=1; done
for round in {1..200}; do
  scan
  lineage
  left=0
  for pid in "${pids[@]}"; do
    [[ ${state[$pid]} == [TZX] || -n ${keep[$pid:${began[$pid]}]} ]] && continue
    [[ -n ${above[$pid]} ]] && continue
    below "$pid" mine && continue
    below "$pid" spare && continue
    kill -STOP "$pid" 2>/dev/null && left=1 && seen[$pid]=1
  done
  [[ $left == 0 ]] && printf '%s ' "${!seen[@]}" && exit 0
done
exit 1
)"""
)


@dataclass(frozen=True)
class Before:
    """The processes of a sandbox before its agent acted, and its users' numbers, as `uid:gid`."""

    processes: str
    numbers: Mapping[str | None, str]  # by the name that a task gives, None for the image's user


async def look_before(sandbox: Sandbox, users: Sequence[str | None], *, timeout_s: float) -> Before:
    """Must run before the agent's first command: it uses the shells of the task's users, still clean."""
    found = await _checked(sandbox, BEFORE, timeout_s, user=users[0])  # before the other shells are there
    numbers = {
        user: (await _checked(sandbox, 'echo "$(id -u):$(id -g)"', timeout_s, user=user)).strip()
        for user in dict.fromkeys(users)
    }
    return Before(found.strip(), numbers)


async def listeners(sandbox: Sandbox, before: Before, *, timeout_s: float) -> list[str]:
    """Processes that serve: those that listen on a TCP port."""
    users = dict.fromkeys([ROOT, *before.numbers.values()])  # without ptrace rights, root sees only root's sockets
    found = [await sandbox.run_apart(_LISTENERS, timeout_s=timeout_s, user=user) for user in users]
    return list(dict.fromkeys(b" ".join(found).decode(errors="replace").split()))


async def stop(sandbox: Sandbox, before: Before, spare: Sequence[str], *, timeout_s: float) -> list[str]:
    """Stop all that was started since `before`, but for `spare` and what these have started: our shells too, if
    they are open. Returns the process ids. Raises `SandboxError` if it cannot."""
    env = {"KEEP": before.processes, "SPARE": " ".join(spare)}
    return (await sandbox.run_apart(_STOP, timeout_s=timeout_s, user=ROOT, env=env)).decode().split()


async def resume(sandbox: Sandbox, pids: Sequence[str], *, timeout_s: float) -> None:
    if pids:
        script = f"kill -CONT {' '.join(pids)} 2>/dev/null || true"  # some may have ended
        await sandbox.run_apart(script, timeout_s=timeout_s, user=ROOT)


async def _checked(sandbox: Sandbox, script: str, timeout_s: float, *, user: str | None) -> str:
    result = await sandbox.run_command(script, timeout_s=timeout_s, user=user)
    if result.exit_code != 0:
        said = result.stderr.decode("utf-8", errors="replace").strip()
        raise SandboxError(
            f"looking after the sandbox's processes failed with status {result.exit_code}: {said[-500:]}"
        )
    return result.stdout.decode("utf-8", errors="replace")
