"""Who owns a sandbox, and when nobody does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import docker.errors
import pytest
import requests

from sandbox.reap import LEASE_GRACE_S, LEASE_LABEL, OWNER_LABEL, Owner, reap, why_reaped


def labels(owner: str, lease_s: float = 3600.0) -> dict[str, str]:
    return {OWNER_LABEL: owner, LEASE_LABEL: str(int(time.time() + lease_s))}


def reason(owner: str, lease_s: float = 3600.0) -> str | None:
    return why_reaped(labels(owner, lease_s), time.time())


@pytest.fixture
def dead() -> Owner:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    me = Owner.this_process()
    return Owner(me.boot, me.pid_namespace, process.pid, me.started_ticks)


def test_a_label_names_its_owner():
    me = Owner.this_process()
    assert Owner.of_label(me.label()) == me
    assert not me.is_dead()


def test_the_living_are_left_alone():
    assert reason(Owner.this_process().label()) is None
    parent = Owner.this_process()
    assert reason(parent.label(), lease_s=-LEASE_GRACE_S / 2) is None


def test_the_dead_are_not(dead: Owner):
    assert f"process {dead.pid}" in (reason(dead.label()) or "")


def test_a_zombie_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    me = Owner.this_process()
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    owner = Owner(me.boot, me.pid_namespace, process.pid, int(stat[stat.rindex(")") + 2 :].split()[19]))
    assert reason(owner.label()) is None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert reason(owner.label()) is not None
    process.communicate()


def test_a_process_number_that_was_given_again_is_another_process():
    me = Owner.this_process()
    assert reason(Owner(me.boot, me.pid_namespace, me.pid, me.started_ticks - 1).label()) is not None


def test_what_another_machine_boot_or_namespace_holds_waits_for_its_lease(dead: Owner):
    for other in (
        Owner("another-boot", dead.pid_namespace, dead.pid, dead.started_ticks),
        Owner(dead.boot, "pid:[1]", dead.pid, dead.started_ticks),
    ):
        assert reason(other.label()) is None
        assert "lease" in (reason(other.label(), lease_s=-LEASE_GRACE_S - 5) or "")


def test_an_ended_lease_is_the_end_even_of_a_living_owners():
    assert "lease" in (reason(Owner.this_process().label(), lease_s=-LEASE_GRACE_S - 5) or "")


def test_an_unreadable_owner_waits_for_its_lease():
    assert reason("what?") is None


class GoingAway:
    """An engine with one container that is being removed: it has no name any longer."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def containers(self, **options: object) -> list[dict]:
        return [{"Id": "0123456789abcdef", "Names": None, "Labels": labels(self._owner.label())}]

    def inspect_container(self, container: str) -> dict:
        return {"State": {"Paused": False}}

    def remove_container(self, container: str, **options: object) -> None:
        pass


def test_a_sandbox_without_a_name_is_reaped_by_its_id(dead: Owner):
    (reaped,) = reap(GoingAway(dead))  # type: ignore[arg-type]
    assert reaped.name == "0123456789ab"


class Thawing(GoingAway):
    """An engine whose one container is frozen; thawed, it sees that its owner is dead, and goes by itself."""

    calls: tuple[str, ...] = ()

    def inspect_container(self, container: str) -> dict:
        return {"State": {"Paused": True}}

    def unpause(self, container: str) -> None:
        self.calls += ("unpause",)

    def remove_container(self, container: str, **options: object) -> None:
        self.calls += ("remove",)
        response = requests.Response()
        response.status_code = 409
        raise docker.errors.APIError("removal of container 0123456789ab is already in progress", response)

    def wait(self, container: str, timeout: float, condition: str) -> None:
        self.calls += (condition,)
        raise docker.errors.NotFound("gone")


def test_a_frozen_sandbox_that_goes_by_itself_once_thawed_is_reaped_and_waited_for(dead: Owner):
    engine = Thawing(dead)
    (reaped,) = reap(engine)  # type: ignore[arg-type]
    assert (reaped.name, engine.calls) == ("0123456789ab", ("unpause", "remove", "removed"))
