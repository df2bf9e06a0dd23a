"""`python -m sandbox.reap`: removes the sandboxes that dead owners left, or whose lease has ended.

Every sandbox carries its owner in a label. What a living process of this machine holds is never touched, nor
what another machine holds, until its lease ends.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import docker
import docker.errors

from errors import UserError
from sandbox.docker_engine import ENGINE_ERRORS, connect, remove_container

log = logging.getLogger(__name__)

SANDBOX_LABEL = "protege.sandbox"  # the run that it belongs to
OWNER_LABEL = "protege.owner"
LEASE_LABEL = "protege.lease_until"  # seconds since 1970
LEASE_GRACE_S = 60.0  # a sandbox ends itself at its lease; this is for those that did not


@dataclass(frozen=True)
class Owner:
    """One process on one boot of one machine; `pid` alone would be given to another one day."""

    boot: str
    pid_namespace: str
    pid: int
    started_ticks: int

    @classmethod
    def this_process(cls) -> Owner:
        return cls(*this_machine(), os.getpid(), started_ticks(os.getpid()) or 0)

    def label(self) -> str:
        return f"{self.boot} {self.pid_namespace} {self.pid} {self.started_ticks}"

    @classmethod
    def of_label(cls, label: str) -> Owner | None:
        found = re.fullmatch(r"(\S+) (\S+) (\d+) (\d+)", label)
        return cls(found[1], found[2], int(found[3]), int(found[4])) if found else None

    def is_dead(self) -> bool:
        """Certain, not likely: a process of another machine, boot or process namespace is not ours to judge."""
        if (self.boot, self.pid_namespace) != this_machine():
            return False
        return started_ticks(self.pid) != self.started_ticks


@cache
def this_machine() -> tuple[str, str]:
    """This boot's id and this process namespace: where a process number means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, os.readlink("/proc/self/ns/pid")


def started_ticks(pid: int) -> int | None:
    """When a process started, in ticks since boot; None: there is none, or it has ended and waits to be collected."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *_ = fields = stat[stat.rindex(")") + 2 :].split()
    return None if state in "ZX" else int(fields[19])


@dataclass(frozen=True)
class Reaped:
    """One sandbox that was removed, and why."""

    name: str
    reason: str


def reap(client: docker.APIClient | None = None) -> list[Reaped]:
    """Remove every sandbox that nobody holds. Blocks; about a second for a dozen. Raises `SandboxUnavailableError`."""
    if client is None:
        with connect() as client:
            return reap(client)
    removed = []
    for found in client.containers(all=True, filters={"label": SANDBOX_LABEL}):
        reason = why_reaped(found["Labels"], time.time())
        if reason is not None and remove(client, found["Id"]):
            names = found["Names"] or [found["Id"][:12]]  # null while it goes
            removed.append(Reaped(names[0].lstrip("/"), reason))
    return removed


def why_reaped(labels: dict[str, str], now: float) -> str | None:
    """None: somebody may hold it."""
    lease_until = float(labels.get(LEASE_LABEL, "0"))
    if now > lease_until + LEASE_GRACE_S:
        return f"its lease ended {now - lease_until:.0f} s ago"
    owner = Owner.of_label(labels.get(OWNER_LABEL, ""))
    if owner is not None and owner.is_dead():
        return f"its owner, process {owner.pid}, is dead"
    return None


def remove(client: docker.APIClient, container: str) -> bool:
    """False: it is going or gone without us, or the engine cannot; the next look will tell."""
    try:
        remove_container(client, container)
    except ENGINE_ERRORS as error:  # one container that the engine is stuck over must not keep a run from starting
        if not (isinstance(error, docker.errors.APIError) and error.status_code in (404, 409)):
            log.warning("container %s could not be removed: %s", container, error)
        return False
    return True


def main() -> None:
    removed = reap()
    for sandbox in removed:
        print(f"removed {sandbox.name}: {sandbox.reason}")
    print(f"{len(removed)} sandboxes removed")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
