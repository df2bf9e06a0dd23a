"""A Docker engine of a test's own, to be restarted and killed without anyone else's noticing."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from errors import SandboxUnavailableError
from sandbox.docker_engine import connect

START_TIMEOUT_S = 60.0


class OwnEngine:
    """A second dockerd beside the machine's, as a context manager. The caller points DOCKER_HOST at `host`.
    `options`: more of dockerd's own."""

    def __init__(self, *options: str) -> None:
        if os.geteuid() != 0 or not shutil.which("dockerd") or not shutil.which("unshare"):
            pytest.skip("only root can start an engine of its own, and needs dockerd and unshare for it")
        self._options = options
        self._folder = Path(tempfile.mkdtemp(prefix="engine"))  # pytest's paths are too long for the engine's sockets
        self._daemon: subprocess.Popen[bytes] | None = None
        self.host = f"unix://{self._folder}/docker.sock"

    def __enter__(self) -> OwnEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def start(self) -> None:
        """Returns when it answers; DOCKER_HOST must name it."""
        folders = [f"--{name}={self._folder}/{name}" for name in ("data-root", "exec-root", "pidfile")]
        # In a network namespace of its own: an engine without a bridge removes the machine's, which is the other's.
        # And of mounts: crun refuses machines with both versions of cgroups, of which the second is idle here.
        begin = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec dockerd "$@"'
        isolated = ["unshare", "--net", "--mount", "sh", "-c", begin, "dockerd"]
        options = [f"--host={self.host}", "--bridge=none", "--iptables=false", "--shutdown-timeout=2", *self._options]
        with (self._folder / "log").open("ab") as log:
            self._daemon = subprocess.Popen([*isolated, *options, *folders], stdout=log, stderr=log)
        until = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return connect().close()
            except SandboxUnavailableError:
                if self._daemon.poll() is not None or time.monotonic() > until:
                    pytest.skip(f"no second engine starts here: {(self._folder / 'log').read_text()[-500:]}")
                time.sleep(0.2)

    @property
    def runtime_state(self) -> str:
        """Where runtimes keep their accounts of this engine's containers, whichever they are."""
        return f"{self._folder}/exec-root/runtime-runc/moby"

    def stop(self) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(60)
            self._daemon = None

    def restart(self) -> None:
        """Its containers die with it."""
        self.stop()
        self.start()
