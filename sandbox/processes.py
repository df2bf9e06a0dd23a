"""The processes of one container: which command started each, ending them, and proof that they are gone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio

MARK = "PROTEGE_COMMAND"
"""The environment variable that tells which command a process was started by."""

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PASS_S = 0.005
GONE = "ZX"  # zombie, dead: runs nothing any longer


@dataclass(frozen=True)
class ContainerProcess:
    """A process of a container, as this machine's /proc shows it."""

    pid: int
    pid_inside: int
    started_ticks: int  # since boot
    mark: str  # the command that started it; empty if it has dropped that
    parent: int = 0


class HostView:
    """One container's processes seen from this machine, if the engine runs here and we may look."""

    def __init__(self, container: str, init_pid: int) -> None:
        self._container = container.encode()
        self._init_pid = init_pid

    def processes(self) -> list[ContainerProcess]:
        """Those that run, but for the container's own: init, and the keeper, which is its first child. A shell may
        have been there before the keeper."""
        found = [process for entry in os.listdir("/proc") if entry.isdigit() and (process := self._look(int(entry)))]
        found.sort(key=lambda process: process.pid_inside)
        keeper = next((process.pid for process in found if process.parent == self._init_pid), 0)
        return [process for process in found if process.pid not in (self._init_pid, keeper)]

    def _look(self, pid: int) -> ContainerProcess | None:
        try:
            if self._container not in Path(f"/proc/{pid}/cgroup").read_bytes():
                return None
            state, parent, started = stat_fields(Path(f"/proc/{pid}/stat").read_text(errors="replace"))
            if state in GONE:
                return None
            inside = re.search(rb"^NSpid:.*\s(\d+)$", Path(f"/proc/{pid}/status").read_bytes(), re.MULTILINE)
        except OSError:  # ended meanwhile
            return None
        pid_inside = int(inside[1]) if inside else 0
        if pid_inside == 0:  # it is just ending, and has lost its number: it would pass for the container's first
            return None
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # ended, or not for us to see: then whose it is cannot be told
            environ = b""
        return ContainerProcess(pid, pid_inside, started, mark_in(environ), parent)

    def lives(self, pid: int) -> bool:
        return pid > 0 and self._look(pid) is not None

    def shows(self, pid: int, mark: str) -> bool:
        """Whether a process that must be there is there."""
        return (process := self._look(pid)) is not None and process.mark == mark

    def kill(self, pid: int) -> None:
        """SIGKILL, unless the number has passed on to another process."""
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(pid)
            try:
                if self._look(pid) is not None:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)

    async def end(self, doomed: Callable[[ContainerProcess], bool], within_s: float) -> bool:
        """Kill what is doomed, and what that starts meanwhile, until none is left. False: some would not die."""
        until = time.monotonic() + within_s
        while True:
            left = [process for process in self.processes() if doomed(process)]
            for process in left:
                self.kill(process.pid)
            if not left:
                return True
            if time.monotonic() > until:
                return False
            await anyio.sleep(PASS_S)

    @contextlib.contextmanager
    def without_forks(self) -> Iterator[None]:
        """Nothing inside can start a process meanwhile, where the kernel lets us say how many there may be. One at a
        time."""
        limits: dict[Path, str] = {}
        with contextlib.suppress(OSError):
            limits = {file: file.read_text() for file in self._group_files("pids", "pids.max", "pids.max")}
            for file in limits:
                file.write_text("0")  # what is there already goes on
        try:
            yield
        finally:
            for file, allowed in limits.items():
                with contextlib.suppress(OSError):  # its container has ended
                    file.write_text(allowed)

    def oom_kills(self) -> int:
        """How many processes of this container the kernel has killed for want of memory; 0 too if it cannot tell."""
        with contextlib.suppress(OSError):
            for file in self._group_files("memory", "memory.oom_control", "memory.events"):
                if count := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE):
                    return int(count[1])
        return 0

    def _group_files(self, controller: str, name: str, unified: str) -> list[Path]:
        """The file of the container's control group that is called `name` in version 1, or else `unified`.

        Raises `OSError`."""
        found = []
        for entry in Path(f"/proc/{self._init_pid}/cgroup").read_text().splitlines():
            _, controllers, path = entry.split(":", 2)
            if controllers == controller:
                found.append(Path(f"/sys/fs/cgroup/{controller}{path}", name))
            elif not controllers:
                found.append(Path(f"/sys/fs/cgroup{path}", unified))
        return [file for file in found if file.exists()]


def host_view(container: str, init_pid: int) -> HostView | None:
    """None if the engine runs elsewhere, or does not let us look or kill: then that is done from inside."""
    try:
        cgroup = Path(f"/proc/{init_pid}/cgroup").read_text()
    except OSError:
        return None
    return HostView(container, init_pid) if container in cgroup and os.geteuid() == 0 else None


def now_ticks() -> int:
    """The time that a process which starts now will carry."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S)


def stat_fields(stat: str) -> tuple[str, int, int]:
    """State, parent, and start time in ticks since boot. The name before them may hold anything, brackets too."""
    fields = stat[stat.rindex(")") + 2 :].split()
    return fields[0], int(fields[1]), int(fields[19])


def mark_in(environ: bytes) -> str:
    prefix = f"{MARK}=".encode()
    for entry in environ.split(b"\0"):
        if entry.startswith(prefix):
            return entry[len(prefix) :].decode(errors="replace")
    return ""


# Where the engine is on another machine, or does not let us look, the same is done from inside, as the command's
# own user and with no more rights: bash comes from the image, which the command may have replaced. It ends what
# carries the doomed mark, its shell's, or none that begins as the known ones do, but for the container's first two;
# and prints how many it could not end.
END_INSIDE = r"""
doomed=$1 shell=$2 known=$3 keeper=
for folder in /proc/[0-9]*; do
  pid=${folder#/proc/}
  { while read -r key parent _; do [[ $key == PPid: ]] && break; done < "$folder/status"; } 2>/dev/null
  ((parent == 1 && (keeper == 0 || pid < keeper))) && keeper=$pid
done
for ((tries = 0; tries < 200; tries++)); do
  left=0
  for folder in /proc/[0-9]*; do
    pid=${folder#/proc/}
    [[ $pid == 1 || $pid == "$keeper" || $pid == "$$" ]] && continue
    stat=
    { IFS= read -r -d '' stat < "$folder/stat"; } 2>/dev/null  # whole: a name may hold newlines
    [[ $stat ]] || continue
    [[ ${stat##*) } == [ZX]* ]] && continue
    if [[ $known && $EUID != 0 ]]; then  # what is another user's can be neither read nor ended
      uid=
      { while read -r key uid _; do [[ $key == Uid: ]] && break; done < "$folder/status"; } 2>/dev/null
      [[ $uid == "$EUID" ]] || continue
    fi
    mark=
    {
      while IFS= read -r -d '' entry; do
        [[ $entry == PROTEGE_COMMAND=* ]] && mark=${entry#*=}
      done < "$folder/environ"
    } 2>/dev/null
    [[ $known && $mark == "$known"* && $mark != "$doomed" && $mark != "$shell" ]] && continue
    [[ -e $folder ]] || continue
    left=$((left + 1))
    kill -9 "$pid" 2>/dev/null
  done
  ((left)) || break
  read -r -t 0.02 _
done
echo "left $left"
"""

OOM_KILLS_INSIDE = """
for file in /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; do
  [ -r "$file" ] && while read -r key value; do [ "$key" = oom_kill ] && echo "$value"; done < "$file"
done
"""
